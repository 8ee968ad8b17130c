"""`llm`'s first pages, with the endpoint among its OpenAI-compatible models: a prompt, a conversation, a stream."""

import json
import os
import sys
import tempfile

url, key, model = sys.argv[1:]
with tempfile.TemporaryDirectory() as home:
    os.environ["LLM_USER_PATH"] = home
    with open(f"{home}/extra-openai-models.yaml", "w") as file:  # YAML holds JSON
        json.dump([{"model_id": "mine", "model_name": model, "api_base": url, "api_key_name": "mine"}], file)
    with open(f"{home}/keys.json", "w") as file:
        json.dump({"mine": key}, file)
    import llm

    mine = llm.get_model("mine")
    print(mine.prompt("the film", system="short", max_tokens=4).text())
    conversation = mine.conversation()
    print(conversation.prompt("the film", max_tokens=4, stream=False).text())
    print(conversation.prompt("good", max_tokens=4, stream=False).text())
    print("".join(mine.prompt("the film", max_tokens=4, stream=True)))
