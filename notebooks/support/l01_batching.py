"""The same page's second program, "dynamic batching": what it puts in place of the loop's body."""

import asyncio


async def serve_one_batch(queue, pipe):
    text, reply = await queue.get()
    texts, replies = [], []
    while True:
        try:
            text, reply = await asyncio.wait_for(queue.get(), timeout=0.001)
        except TimeoutError:
            break
        texts.append(text)
        replies.append(reply)
    outputs = pipe(texts, batch_size=len(texts))
    for reply, output in zip(replies, outputs):
        await reply.put(output)
