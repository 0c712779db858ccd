//! The byte-level alphabet: GPT-2's map of every byte to a printable character.
//!
//! Source: `bytes_to_unicode` in OpenAI's gpt-2 `encoder.py`. Printable Latin-1 stands for itself, the other 68
//! bytes are U+0100 upwards in order.

/// The byte that a character of the alphabet stands for.
pub(crate) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        // In order: 0x00..=0x20 (33), 0x7F..=0xA0 (34), 0xAD.
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The bytes of a token's text; a text with a character outside the alphabet stands for itself, as in the
/// `tokenizers` crate.
pub(crate) fn bytes_of(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_bijection_of_all_bytes() {
        let mut bytes: Vec<u8> = (0..0x144).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('中'), None);
    }

    #[test]
    fn foreign_text_stands_for_itself() {
        let mut out = b"x".to_vec();
        bytes_of("Ġ中", &mut out);
        assert_eq!(out, "xĠ中".as_bytes());
    }
}
