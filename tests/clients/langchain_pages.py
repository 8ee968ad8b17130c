"""LangChain's first pages: invoke, stream, a conversation, and the error by which a chain takes another model."""

import sys

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url, key, model = sys.argv[1:]
settings = {"model": model, "base_url": url, "api_key": key, "max_retries": 0}
chat = ChatOpenAI(max_tokens=4, **settings)

answer = chat.invoke([("system", "short"), ("human", "the film")])
print(answer.content)
print("".join(part.content for part in chat.stream("the film")))
again = [SystemMessage("short"), HumanMessage("the film", name="ann"), answer, HumanMessage("good")]
assert isinstance(chat.invoke(again), AIMessage)
print([one.content for one in chat.batch(["the film", "a plot"])])
print(OpenAI(max_tokens=4, **settings).invoke("the film"))

try:
    chat.invoke("the film " * 60)
except ContextOverflowError as raised:
    print(type(raised).__name__)
