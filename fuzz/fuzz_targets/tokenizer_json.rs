//! `tokenizer.json`: any file gives a tokenizer or an error, and the tokenizer does what it promises.
#![no_main]

use std::sync::atomic::{AtomicBool, Ordering};

use forebay_tokens::{Detokenizer, Special, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TEXTS: [&str; 3] =
    ["", "The turbines, 12345 of them!\n\n  e\u{301} ﬁn </s><|im_end|>", "東京 は\u{fdd0}"];

static LOADING: AtomicBool = AtomicBool::new(false);

/// The `tokenizers` crate panics on some files that it reads, which `from_json` turns into an error. Any other panic
/// ends the run, as it does without this.
fn allow_panics_of_the_library() {
    let fatal = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let in_library = panic.location().is_some_and(|at| at.file().contains("/tokenizers-"));
        if !(in_library && LOADING.load(Ordering::Relaxed)) {
            fatal(panic);
        }
    }));
}

fuzz_target!(init: allow_panics_of_the_library(), |data: &[u8]| {
    LOADING.store(true, Ordering::Relaxed);
    let tokenizer = Tokenizer::from_json(data, None, None);
    LOADING.store(false, Ordering::Relaxed);
    let Ok(tokenizer) = tokenizer else { return };
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
