"""Token by token: text generation with continuous batching, the queue's pattern one level down.

    submit(prompt, options) -> waiting -> a slot of the KV cache -> one row in each step -> pieces of text

A *sequence* is a prompt and the tokens that follow it. A *step* is one call of the model: one token for each sequence that
runs, and a chunk of the prompts that are still being read. Between two steps sequences join and leave.

    steps.py       what goes to the model and comes back: plain data
    step_cost.py   how long a step will take, learnt from the steps so far
    slots.py       which part of the KV cache belongs to which sequence
    scheduler.py   which rows the next step has
    estimate.py    when a sequence that came now would have its first token
    admission.py   whether a sequence is admitted
    warm_up.py     which steps are timed before the first request
    token_loop.py  the loop around them: streams, deadlines, failures, stopping
    stream.py      what a reader sees of a sequence
    grammar.py     which tokens may come, where the text must follow a JSON Schema
    text.py        tokens to text and chats to prompts
    counts.py      metrics

These know no torch. The model's half does:

    model.py       answers a step's plan: a forward pass, then sampling
    stock.py       any causal language model of Transformers, unmodified, on a cache of slots
    llama.py       Llama and its relatives by hand, for CPUs
    memory.py      what the kernel is told about the model's memory
    sampling.py    from logits to tokens, each row by its own options
"""
