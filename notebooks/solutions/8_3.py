"""A forkserver's next process begins where its helper is: behind the imports."""


def next_answer_s(method, python_s, imports_s, load_s, helper_died=False):
    is_ready = method == "forkserver" and not helper_died
    return load_s if is_ready else python_s + imports_s + load_s


answer = next_answer_s
