//! Where a value stands in the configuration: `router.fleets[0].model`.

use std::fmt;

/// A key or an index. A path is a slice of them; the empty one is the whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    Key(String),
    Index(usize),
}

/// Writes a path. A key that is not a plain word is quoted: `models["gpt-4.1"].price`.
pub(crate) struct Path<'a>(pub(crate) &'a [Segment]);

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) if is_word(key) && i == 0 => f.write_str(key)?,
                Segment::Key(key) if is_word(key) => write!(f, ".{key}")?,
                Segment::Key(key) => write!(f, "[{key:?}]")?,
            }
        }
        Ok(())
    }
}

fn is_word(key: &str) -> bool {
    !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '/'))
}

/// Reads a path as it is written above. Lenient: what is no path becomes a key that will not be found.
pub(crate) fn parse_path(text: &str) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let end = quoted.find("\"]").unwrap_or(quoted.len());
            segments.push(Segment::Key(quoted[..end].replace("\\\"", "\"")));
            rest = quoted.get(end + 2..).unwrap_or("");
        } else if let Some(bracket) = rest.strip_prefix('[') {
            let end = bracket.find(']').unwrap_or(bracket.len());
            segments.push(match bracket[..end].parse() {
                Ok(index) => Segment::Index(index),
                Err(_) => Segment::Key(bracket[..end].to_owned()),
            });
            rest = bracket.get(end + 1..).unwrap_or("");
        } else {
            let word = rest.strip_prefix('.').unwrap_or(rest);
            let end = word.find(['.', '[']).unwrap_or(word.len());
            segments.push(Segment::Key(word[..end].to_owned()));
            rest = &word[end..];
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_it_writes() {
        let check = |text: &str| assert_eq!(Path(&parse_path(text)).to_string(), text);
        check("");
        check("router.fleets[0].model");
        check("proxy.models[\"gpt-4.1\"].price");
        check("[2][3].x");
        check("a[\"x y\"][0]");
    }

    proptest! {
        #[test]
        fn never_panics(text in "[a-z.\\[\\]\"0-9]{0,20}|.{0,20}") {
            let _ = Path(&parse_path(&text)).to_string();
        }
    }
}
