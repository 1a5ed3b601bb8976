"""A thread for the call, a lock so that calls take turns."""

import asyncio


class answer:
    def __init__(self, model):
        self.model = model
        self.turn = asyncio.Lock()

    async def answer(self, text):
        async with self.turn:
            return await asyncio.to_thread(self.model, text)
