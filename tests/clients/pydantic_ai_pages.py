"""pydantic-ai's first pages, for text: a run, the conversation carried on, a stream."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, key, model = sys.argv[1:]
agent = Agent(
    OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key=key)),
    instructions="short",
    model_settings={"max_tokens": 4},
)

first = agent.run_sync("the film")
print(first.output)
second = agent.run_sync("good", message_history=first.all_messages())
print(second.output)


async def stream() -> str:
    async with agent.run_stream("the film") as result:
        return "".join([part async for part in result.stream_text(delta=True)])


print(asyncio.run(stream()))
