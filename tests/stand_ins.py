"""Stand-ins for what a test cannot download: tokenizers with the templates of known families, and a
server on the loopback."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data

os.environ["NO_PROXY"] = "*"     # the loopback is asked directly

R1_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
QWEN_TOKENS = ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]
R1_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}OPENING{% endif %}")
QWEN_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPENING{% endif %}")
CLOSED = "{{ '<think>\n\n</think>\n\n' }}"
OPENINGS = {    # what the families put behind the prompt
    "left to the model": "",
    "open": "{{ '<think>\n' }}",
    "open, no newline": "{{ '<think>' }}",
    "closed unless asked": "{% if enable_thinking is defined and enable_thinking is true %}"
                           "{{ '<think>\n' }}{% else %}" + CLOSED + "{% endif %}",
    "open unless forbidden": "{% if enable_thinking is defined and enable_thinking is false %}"
                             + CLOSED + "{% endif %}",
    "closed unless thinking": "{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}",
    "closed": CLOSED,
}
# Templates that read a turn as a list of parts, and what they show of a plain string: nothing.
PARTS_TEMPLATES = {
    "filter": "Is it safe?\n{% for m in messages %}{{ m['role'] + ': ' }}"
              "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
              "{{ part['text'] | trim }}{% endfor %}{{ '\n' }}{% endfor %}",
    "loop": "{% for m in messages %}{{ m['role'] + ': ' }}{% for part in m['content'] %}"
            "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}"
            "{% endfor %}",
    "first": "{% for m in messages %}{{ m['role'] + ': ' + m['content'][0]['text'] + '\n' }}"
             "{% endfor %}",
}


def byte_tokenizer(
    template: str | None, special: list[str] = QWEN_TOKENS, *, bos: str | None = None,
    think: tuple[str, ...] = ("<think>", "</think>"), think_is_special: bool = False,
) -> PreTrainedTokenizerFast:
    """Single bytes and a family's added tokens, the EOS first; with a bos, encode() puts it in
    front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken(tag, special=True) for tag in special])
    tokens.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in think])
    if bos:
        tokens.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.token_to_id(bos))])
    eos = special[1] if bos else special[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, clean_up_tokenization_spaces=False, bos_token=bos, eos_token=eos,
        pad_token=eos, chat_template=template)
    if think_is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(think)})
    return tokenizer


def qwen(opening: str = "left to the model", **more: object) -> PreTrainedTokenizerFast:
    """Qwen3's shape: no BOS, turns in <|im_start|> and <|im_end|>."""
    return byte_tokenizer(QWEN_TURNS.replace("OPENING", OPENINGS[opening]), **more)


def r1(opening: str) -> PreTrainedTokenizerFast:
    """The R1 distills' shape: the BOS stands in the template, and the tokenizer adds one too."""
    template = R1_TURNS.replace("OPENING", OPENINGS[opening])
    return byte_tokenizer(template, R1_TOKENS, bos=R1_TOKENS[0])


class Served:
    """A running stand-in server: its address, and the (path, body) of each request."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict]] = []

    def bodies(self) -> list[dict]:
        return [body for _, body in self.requests]


@contextmanager
def serve(answer: Callable[[dict, int], tuple[int, object]], model: str | None = "m"
          ) -> Iterator[Served]:
    """A server at 127.0.0.1: answer(body, number of the request) -> (status, JSON or text).

    model: the name that /models gives; with None there is no /models.
    """
    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, content: object) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if model is None:
                self.reply(404, "no such page")
            else:
                self.reply(200, {"data": [{"id": model}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.requests.append((self.path, body))
                number = len(served.requests)
            self.reply(*answer(body, number))

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64     # with the usual 5, a burst of questions waits a second

    lock = threading.Lock()
    httpd = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{httpd.server_port}/v1")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        httpd.shutdown()
        httpd.server_close()


def chat_reply(content: object, **more: object) -> dict:
    """A chat completion's body."""
    return {"choices": [{"message": {"role": "assistant", "content": content}, **more}]}


def refused(call: Callable, *needles: str) -> None:
    """The call ends in a UserError of one line that holds the needles."""
    with pytest.raises(data.UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert [needle for needle in needles if needle not in message] == [], message
