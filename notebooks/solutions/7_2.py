"""A list in, a list out; what is wrong gets a sentence."""


class answer:
    example = "two words"

    def check(self, inputs, parameters):
        if not isinstance(inputs, str) or not inputs.split():
            raise ValueError("send a text with at least one word")

    def __call__(self, inputs):
        return [len(text.split()) for text in inputs]
