"""A wrong setting is refused at start with one sentence that names it."""

import re
from pathlib import Path

import pytest

from workers.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("BATCH_SIZE", "0", "from 1 to 1,000,000,000"),
        ("BATCH_SIZE", "many", "from 1 to 1,000,000,000"),
        ("BATCH_SIZE", "1.5", "from 1 to 1,000,000,000"),
        ("BATCH_SIZE", "1" + "0" * 20, "from 1 to 1,000,000,000"),
        ("QUEUE_TARGET_S", "-1", "at least 0"),
        ("QUEUE_TARGET_S", "nan", "at least 0"),
        ("DEADLINE_S", "0", "above 0"),
        ("DEADLINE_S", "inf", "above 0"),
        ("GRACE_S", "5e9", "below a million"),
        ("OFFLOAD", "fork", "thread or inline or process"),
        ("DTYPE", "float31", "float32 or auto or bfloat16 or float16"),
        ("FAST", "perhaps", "1 or 0"),
        ("MODEL", "", "a folder with a config.json, a hub id"),
        ("MODEL", "/no/such/folder", "a folder with a config.json, a hub id"),
        ("MODEL", "/", "a folder with a config.json, a hub id"),
    ],
)
def test_wrong_value_is_rejected_with_its_name_the_value_and_what_is_allowed(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        Settings.read()
    assert name in str(refused.value) and repr(value) in str(refused.value) and allowed in str(refused.value)


def test_setting_that_is_gone_is_answered_by_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_WINDOW_MS", "5")
    with pytest.raises(SystemExit, match="BATCH_WINDOW_MS is not a setting any more: remove it"):
        Settings.read()


def test_environment_variable_beats_dot_env_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("BATCH_SIZE=8\nMAX_QUEUE=9\n")
    monkeypatch.setenv("MAX_QUEUE", "7")
    settings = Settings.read()
    assert (settings.BATCH_SIZE, settings.MAX_QUEUE, settings.INSTANCES) == (8, 7, 1)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffAPI_KEY=a-key-0123",
        "export API_KEY=a-key-0123",
        "# of this server\n\n  export  API_KEY = 'a-key-0123'  ",
        'API_KEY="a-key-0123"\r\nMAX_QUEUE=9\r\n',
        "API_KEY=a-key-0123,",
    ],
)
def test_key_in_dot_env_is_found_however_it_is_written(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(content, encoding="utf-8")
    assert Settings.read().API_KEY.startswith("a-key-0123")


def test_empty_variable_does_not_beat_the_key_in_dot_env(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compose file passes a variable that is not set: the server would be open."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("API_KEY=a-key-0123")
    monkeypatch.setenv("API_KEY", "")
    assert Settings.read().API_KEY == "a-key-0123"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"API_KEY a-key-0123", "line 1 of .env is not NAME=VALUE"),
        (b"MAX_QUEUE=9\nset API_KEY=a-key", "line 2 of .env is not NAME=VALUE"),
        ("API_KEY=a-key-0123".encode("utf-16"), "save it as UTF-8"),
        (b"API_KEY=,", "API_KEY=… is not allowed"),
        (b"API_KEY= , ", "API_KEY=… is not allowed"),
        (b"ALLOWED_HOSTS=,", "ALLOWED_HOSTS=',' is not allowed"),
        (b"CORS_ORIGINS=,", "CORS_ORIGINS=',' is not allowed"),
    ],
)
def test_setting_that_guards_is_never_lost_silently(
    content: bytes, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes(content)
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        Settings.read()


def test_threads_of_all_instances_together_never_exceed_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [Settings(INSTANCES=n).threads_per_instance for n in (1, 2, 3, 9)] == [8, 4, 2, 1]
    assert Settings(INSTANCES=2, TORCH_THREADS=6).threads_per_instance == 6  # unless asked for
    monkeypatch.delattr("os.sched_getaffinity")  # as on a Mac
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert Settings(INSTANCES=2).threads_per_instance == 2
