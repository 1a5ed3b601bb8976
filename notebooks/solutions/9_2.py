"""A number finds its future; who is answered no longer waits."""


def answer(replies, waiting):
    while (pair := replies.get()) is not None:
        number, value = pair
        future = waiting.pop(number, None)
        if future is None:
            continue
        if isinstance(value, BaseException):
            future.set_exception(value)
        else:
            future.set_result(value)
