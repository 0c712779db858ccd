//! `tokenizer.json`: any file gives a tokenizer or an error, and the tokenizer does what it promises.
#![no_main]

use forebay_tokens::{Detokenizer, Special, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TEXTS: [&str; 3] = ["", "The turbines, 12345 of them!\n\n  e\u{301} ﬁn </s><|im_end|>", "東京 は\u{fdd0}"];

fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(data, None, None) else { return };
    assert!(tokenizer.vocab_size() > 0);
    for text in TEXTS {
        for special in [Special::NONE, Special::ALL] {
            let Ok(ids) = tokenizer.encode(text, special) else { continue };
            if special == Special::NONE {
                let control = ids.iter().find(|id| tokenizer.is_special(**id) && tokenizer.unk() != Some(**id));
                assert_eq!(control, None, "plain text became a control token");
            }
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
            for id in &ids {
                let _ = detokenizer.push(*id).len();
            }
            let _ = (tokenizer.decode(&ids, false), detokenizer.finish().len());
        }
    }
});
