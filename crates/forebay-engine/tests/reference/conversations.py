"""Makes the conversations that docs/numerics.md measures on: what SmolLM2 itself answers to everyday questions.

    llama-server -m SmolLM2-135M-Instruct.Q4_1.gguf --port 8931 -c 12000 -np 20
    python conversations.py http://127.0.0.1:8931 tokens.kld
    ./llamacpp_ids SmolLM2-135M-Instruct.Q4_1.gguf tokens.kld chat.kld 1 512       # see llamacpp_ids.c
    python llamacpp_logits.py chat.kld ../fixtures/smollm2-chat-llamacpp.bin --chunks 3 --top 48

The answers are sampled at temperature 0.7 from the whole distribution, with a seed each; the user goes on until the
conversation has 256 tokens. (Slots share a batch, so llama.cpp does not sample the same again to the letter.) The output
is the head of a file of llama-perplexity's, without logits.
"""

import json
import struct
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# A conversation a line: the user's turns.
CONVERSATIONS = """
How do I boil an egg?|And how do I peel it without making a mess?
What is photosynthesis?|Why are leaves green?
Give me three tips for better sleep.|Which of them is the easiest to start with?
Write a short email to my landlord about a leaking tap.|Make it a little more polite.
Explain the difference between weather and climate.|Can you give an example?
What should I pack for a weekend hiking trip?|What about food?
Tell me a short story about a fox and a crow.|What is the moral of the story?
How does a bicycle stay upright?|Is it harder to ride slowly?
Who was Marie Curie?|What did she discover?
Suggest a simple vegetarian dinner.|How long does it take to cook?
What are the benefits of regular exercise?|How often should I exercise?
How can I learn to play the guitar?|Which chords should I learn first?
Why is the sky blue?|And why is it red at sunset?
Write a poem about autumn.|Now write one about winter.
What is the capital of Australia, and why isn't it Sydney?|How many people live there?
How do I write a good cover letter?|What mistakes should I avoid?
Explain how a refrigerator works.|How much energy does it use?
What is the water cycle?|What role does the sun play in it?
Give me ideas for a birthday party for a seven-year-old.|What games could they play?
How do vaccines work?|Why do some of them need a second dose?
Write a Python function that reverses a string.|Explain how it works.
What is the difference between a simile and a metaphor?|Give two examples of each.
How can I save money on groceries?|What is meal planning?
Tell me about the Great Wall of China.|How long did it take to build?
What are some good questions to ask in a job interview?|And what should I not ask?
How do I change a flat tire?|What tools do I need?
Summarize the plot of Romeo and Juliet.|Why is it still popular today?
What causes earthquakes?|Can they be predicted?
How should I prepare for a math exam?|How do I stay calm during it?
What do bees do in winter?|How do they make honey?
Describe a typical day in the life of a nurse.|What skills does a nurse need?
How do I grow tomatoes on a balcony?|How often should I water them?
What is inflation in economics?|How does it affect my savings?
Write a product description for a reusable water bottle.|Make it shorter.
How do airplanes fly?|Why do they need such long runways?
What is a good way to start learning Spanish?|How many words do I need to know?
Explain gravity to a five-year-old.|What would happen without it?
What is the history of chocolate?|Where does it grow today?
How do I apologize to a friend?|What if they don't answer?
What are the main causes of climate change?|What can one person do about it?
""".strip().splitlines()
GOES_ON = ["Tell me more.", "Thank you. Is there anything else I should know?", "Can you sum it up?"]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CONTEXT, VOCAB, IM_END = 256, 49152, 2

server, out = sys.argv[1:]


def post(path, body):
    request = urllib.request.Request(server + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def ids(text):
    return post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]


def converse(nth):
    tokens = ids(SYSTEM)
    for turn, user in enumerate(CONVERSATIONS[nth].split("|") + GOES_ON):
        tokens += ids(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        body = {
            "prompt": tokens,
            "n_predict": max(CONTEXT - len(tokens), 1),
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "seed": 1000 + 10 * nth + turn,
            "return_tokens": True,
            "cache_prompt": False,
        }
        tokens += post("/completion", body)["tokens"]
        if len(tokens) >= CONTEXT:
            return tokens[:CONTEXT]
        if tokens[-1] != IM_END:
            tokens.append(IM_END)
        tokens += ids("\n")
    return None


with ThreadPoolExecutor(20) as pool:
    rows = [row for row in pool.map(converse, range(len(CONVERSATIONS))) if row]
with open(out, "wb") as f:
    f.write(b"_logits_" + struct.pack("<III", CONTEXT, VOCAB, len(rows)) + np.array(rows, np.int32).tobytes())
print(len(rows), "conversations of", CONTEXT, "tokens")
