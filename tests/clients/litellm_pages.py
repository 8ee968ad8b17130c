"""litellm's first pages: a completion, a stream, the message sent back, and the errors that its fall-backs need."""

import sys

import litellm

litellm.suppress_debug_info = True
url, key, model = sys.argv[1:]
settings = {"model": f"openai/{model}", "api_base": url, "api_key": key, "max_tokens": 4, "num_retries": 0}
messages = [{"role": "user", "content": "the film"}]

answer = litellm.completion(messages=messages, **settings)
print(answer.choices[0].message.content)
for again in (answer.choices[0].message, answer.choices[0].message.model_dump()):
    litellm.completion(messages=[*messages, again, *messages], **settings)
parts = [{"type": "text", "text": "the film", "cache_control": {"type": "ephemeral"}}]
litellm.completion(messages=[{"role": "system", "content": parts}, *messages], **settings)
chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **settings))
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
text = litellm.text_completion(prompt="the film", **settings)
print(text.choices[0].text)

for error, changes in [
    (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "the film " * 60}]}),
    (litellm.AuthenticationError, {"api_key": "wrong"}),
    (litellm.NotFoundError, {"model": "openai/other"}),
    (litellm.BadRequestError, {"extra_body": {"unheard_of": 1}}),
]:
    try:
        litellm.completion(**({"messages": messages} | settings | changes))
    except error as raised:
        print(type(raised).__name__)

router = litellm.Router(
    model_list=[
        {"model_name": "small", "litellm_params": settings},
        {"model_name": "large", "litellm_params": settings | {"mock_response": "from the other"}},
    ],
    context_window_fallbacks=[{"small": ["large"]}],
    num_retries=0,
)
long = [{"role": "user", "content": "the film " * 60}]
print(router.completion(model="small", messages=long).choices[0].message.content)
