"""Asks a deployment one question through the openai client, streamed.

python examples/chat.py numbers "4821"

Reads TUNESMITH_URL (default http://127.0.0.1:8000) and TUNESMITH_API_KEY (default: what lies in data/api_key).
"""

import os
import sys
from pathlib import Path


def main() -> None:
    """Prints the answer as it comes."""
    from openai import OpenAI

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _, model, question = sys.argv
    client = OpenAI(
        base_url=os.environ.get("TUNESMITH_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("TUNESMITH_API_KEY") or Path("data/api_key").read_text().strip(),
    )
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "Spell the number in words."},
            {"role": "user", "content": question},
        ],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
