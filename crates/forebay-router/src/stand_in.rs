//! Ids that stand in for a prompt's tokens where no tokenizer of its model is at hand, which is so in a process without
//! an engine.
//!
//! They are made from the prompt's own bytes: equal beginnings give equal ids, and nothing more is asked of them. What
//! was sent to a replica before is found again this way; what a replica reports about its cache is not. No vocabulary
//! has such large ids, so they never meet real ones in the index.
//!
//! llm-d's approximate prefix scorer hashes the text of prompts in the same way.

use std::sync::Arc;

use forebay_types::TokenId;
use forebay_wire::{ChatMessage, Prompt};

/// Bytes of text for one id. The estimate of a prompt's length takes 3.5: with 4, what is expected to be cached is never
/// more than the whole prompt.
const BYTES: usize = 4;

/// The ids of each prompt. Pure, O(bytes).
pub(crate) fn stand_ins(prompt: &Prompt) -> Vec<Arc<[TokenId]>> {
    match prompt {
        Prompt::Tokens(prompts) => prompts.iter().map(|ids| ids.as_slice().into()).collect(),
        Prompt::Text(texts) => texts.iter().map(|text| of_bytes(text.as_bytes())).collect(),
        Prompt::Chat { messages, tools, .. } => {
            let mut text = Vec::with_capacity(prompt.text_bytes());
            // Templates write the tools first.
            if let Some(tools) = tools {
                text.extend_from_slice(tools.to_string().as_bytes());
            }
            messages.iter().for_each(|message| put_message(message, &mut text));
            vec![of_bytes(&text)]
        }
    }
}

fn of_bytes(bytes: &[u8]) -> Arc<[TokenId]> {
    let id = |chunk: &[u8]| {
        let mut word = [0u8; BYTES];
        word[..chunk.len()].copy_from_slice(chunk);
        TokenId::from_be_bytes(word)
    };
    bytes.chunks(BYTES).map(id).collect()
}

/// With separators that text seldom has, so that two messages don't read like one.
fn put_message(message: &ChatMessage, out: &mut Vec<u8>) {
    out.push(0x1e);
    out.extend_from_slice(message.role.as_bytes());
    out.push(0x1f);
    out.extend_from_slice(message.content.to_text().as_bytes());
    for (name, value) in &message.extra {
        out.push(0x1f);
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value.to_string().as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use forebay_flow::PromptIds;
    use forebay_wire::Content;

    use super::*;

    fn text(text: &str) -> Prompt {
        Prompt::Text(vec![text.to_owned()])
    }

    fn chat(texts: &[&str]) -> Prompt {
        let message = |text: &&str| ChatMessage {
            role: "user".into(),
            content: Content::Text((*text).into()),
            extra: serde_json::Map::new(),
        };
        Prompt::Chat {
            messages: texts.iter().map(message).collect(),
            tools: None,
            add_generation_prompt: true,
            chat_template_kwargs: None,
        }
    }

    #[test]
    fn equal_beginnings_give_equal_ids() {
        let check = |a: &Prompt, b: &Prompt, expect: usize| {
            let (a, b) = (stand_ins(a), stand_ins(b));
            assert_eq!(a[0].iter().zip(b[0].iter()).take_while(|(a, b)| a == b).count(), expect);
        };
        let long = "x".repeat(400);
        check(&text(&long), &text(&long), 100);
        check(&text(&long), &text(&format!("{long}{long}")), 100);
        check(&text(&long), &text(&format!("y{long}")), 0);
        // A conversation that goes on begins as it did: 6 bytes of separators and role come first.
        check(&chat(&[&long]), &chat(&[&long, "and then?"]), 101);
        check(&chat(&[&long]), &chat(&["and then?", &long]), 1);
        check(&chat(&["ab", "c"]), &chat(&["abc"]), 2);
    }

    #[test]
    fn ids_of_the_client_are_taken_as_they_are() {
        let ids: Vec<TokenId> = (0..40).collect();
        assert_eq!(*stand_ins(&Prompt::Tokens(vec![ids.clone()]))[0], *ids);
    }

    #[test]
    fn there_are_no_more_than_the_estimate_has_tokens() {
        for bytes in [0, 1, 4, 63, 64, 1000, 4097] {
            let prompt = text(&"x".repeat(bytes));
            assert!(stand_ins(&prompt)[0].len() as u32 <= PromptIds::estimate(&prompt).tokens(), "{bytes}");
        }
    }
}
