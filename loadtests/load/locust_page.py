"""What Locust's page gets besides its own: goodput, offered load and p99 as charts, and options that are checked before START."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from flask import Response, jsonify, request

from loadtests.load.goodput import COLUMNS, write_rows

SCRIPT = Path(__file__).with_name("page.js")


def extend(web_ui: Any, environment: Any, problem: Callable[[dict[str, Any]], str]) -> None:
    """Add the charts and their data to the page. `problem` says what is wrong with a form, empty where nothing is."""
    app, base = web_ui.app, environment.parsed_options.web_base_path or ""
    web_ui.template_args["extended_csv_files"] = [
        {"href": "./goodput/csv", "title": "Download goodput per second CSV"}
    ]
    update = web_ui.update_template_args

    def with_default_classes() -> None:
        """Tick what the command line names, not all there is: the page ticks those that it believes available."""
        update()
        web_ui.template_args["available_user_classes"] = environment.parsed_options.user_classes

    web_ui.update_template_args = with_default_classes

    @app.before_request
    def check() -> Response | None:
        if request.path != f"{base}/swarm" or request.method != "POST":
            return None
        form = {**request.form.to_dict(), "user_classes": request.form.getlist("user_classes")}
        if not (sentence := problem(form)):
            return None
        return jsonify({"success": False, "message": sentence, "host": environment.host})

    @app.after_request
    def add_script(response: Response) -> Response:
        if request.path.rstrip("/") == base and response.mimetype == "text/html":
            html = response.get_data(as_text=True)
            response.set_data(html.replace("</body>", '<script src="./goodput/page.js"></script></body>'))
        return response

    @app.route(f"{base}/goodput/page.js")
    @web_ui.auth_required_if_enabled
    def script() -> Response:
        return Response(SCRIPT.read_text(), mimetype="text/javascript")

    @app.route(f"{base}/goodput")
    @web_ui.auth_required_if_enabled
    def data() -> Response:
        limit_s = environment.parsed_options.limit_s
        series = environment.goodput.series() if environment.goodput else []
        lines = environment.goodput.sentences(limit_s) if series else []
        return jsonify({"columns": COLUMNS, "rows": series, "limit_ms": 1000 * limit_s, "sentences": lines})

    @app.route(f"{base}/goodput/csv")
    @web_ui.auth_required_if_enabled
    def rows() -> Response:
        out = StringIO()
        write_rows(out, environment.goodput.series() if environment.goodput else [])
        headers = {"Content-Disposition": "attachment;filename=goodput.csv"}
        return Response(out.getvalue(), mimetype="text/csv", headers=headers)
