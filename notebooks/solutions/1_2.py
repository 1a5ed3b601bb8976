"""Keep the first text; take what is already there and no more; wrap the answer of a batch of one."""


async def answer(queue, pipe, most=8):
    batch = [await queue.get()]
    while len(batch) < most and not queue.empty():
        batch.append(queue.get_nowait())
    texts = [text for text, _ in batch]
    outputs = pipe(texts, batch_size=len(texts))
    if len(texts) == 1:
        outputs = [outputs]
    for (_, reply), output in zip(batch, outputs, strict=True):
        await reply.put(output)
