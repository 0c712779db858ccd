"""Makes gemma3-tokens.json: the ids that llama.cpp gives to texts with Gemma 3's vocabulary.

    llama-server -m gemma-3-270m-q4_k_m.gguf --port 8931
    python llamacpp_tokens.py http://127.0.0.1:8931 ../fixtures/gemma3-tokens.json
"""

import json
import sys
import urllib.request

TEXTS = [
    "The capital of France is",
    " leading space, and   three,  trailing  ",
    "\n",
    "a\n\nb\n\n\n\nc" + "\n" * 40 + "d",
    "\t\tdef f(x):\n\t\t\treturn x ** 2  # comment\n",
    "    for (int i = 0; i < n; ++i) {\r\n        sum += a[i];\r\n    }",
    " " * 40 + "x" + "\t" * 40,
    "1234567890 3.14159 1,000,000 0x1F ½ ² Ⅷ ٣٤",
    "I'LL we'll don’t “quoted” ‘single’ — dash – en … dots",
    "Die Würde des Menschen ist unantastbar. Größe, STRAẞE, ﬁne.",
    "L'été à la plage, où êtes-vous ? Ça va",
    "東京は日本の首都です。今日は天気がいいですね。",
    "你好，世界。春眠不觉晓，处处闻啼鸟。",
    "한국어 텍스트와 띄어쓰기",
    "Привет, как дела? Съешь ещё этих мягких французских булок",
    "नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم שלום עולם",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🎉 🫠 𝒳 𐎠 \U000e0041",
    "e\u0301 n\u0303 zero\u200bwidth\u00a0nbsp\u3000ideographic\u2028line \ufeff",
    "\x01\x02\x7f control \x1b[0m",
    "<table><tr><td>cell</td></tr></table> <b>bold</b> <i>not closed",
    "<bos> <eos> <pad> <unk> <mask> <unused0> <start_of_turn>user\nhi<end_of_turn>",
    "<0x0A><0xFF> [multimodal] <start_of_image><end_of_image>",
    "literal ▁ and ▁▁▁ lower one eighth block",
    "((([[[{{{!!!???...---$$$+++<<<>>>~~~|||```",
    "a" * 100,
    "ab" * 60,
    "https://example.com/path?q=1&r=%20#frag someone@example.com C:\\Windows\\System32",
    '{"name": "f", "arguments": {"x": [1, 2.5e-3, null, true]}}',
    "snake_case camelCase HTTPServer ABCdef kebab-case __init__",
    "SELECT * FROM t WHERE a = 'b''c' AND d <> 1;",
    "price: €12,50 (approx. £10) & more % 50 ¥₹₿",
    "∑_{i=0}^{n} x_i² ≤ ∫₀^∞ e^{-x} dx ⇒ α∧β",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore.",
    "x\u0000y",
]
# Not here: `</s>`, which llama.cpp takes for an end of generation and so does not find in plain text; for Gemma's
# authors it is a word like `</b>`.

server, out = sys.argv[1:]


def ids(text):
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{server}/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


cases = [{"text": text, "ids": ids(text)} for text in TEXTS]
rows = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
open(out, "w").write(f"[\n{rows}\n]\n")
print(len(cases), "texts,", sum(len(case["ids"]) for case in cases), "ids")
