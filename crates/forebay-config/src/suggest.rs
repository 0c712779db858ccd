//! "Did you mean": the closest known name, if it is close enough to be meant.

/// The name that differs by the fewest typing slips; case, `_` and `-` don't count. `None` if all are far.
pub fn closest<'a>(written: &str, names: &[&'a str]) -> Option<&'a str> {
    // Comparing is quadratic, and nobody misspells a known key by writing a paragraph.
    if written.len() > 100 {
        return None;
    }
    let written = folded(written);
    let (slips, name) = names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&written, &folded(name)), *name))
        .min_by_key(|(slips, _)| *slips)?;
    let length = written.chars().count().max(name.chars().count());
    // As rustc: a third of the letters may be wrong; but two letters are too short to guess from.
    (slips <= length / 3 && length > 2 || slips == 0).then_some(name)
}

fn folded(name: &str) -> String {
    name.chars().map(|c| if c == '_' { '-' } else { c.to_ascii_lowercase() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_what_is_close() {
        let names = ["listen", "tls", "routes", "queued-tokens-max"];
        let check = |written: &str, expect| assert_eq!(closest(written, &names), expect, "{written}");
        check("queued-token-max", Some("queued-tokens-max"));
        check("queued_tokens_max", Some("queued-tokens-max"));
        check("Listen", Some("listen"));
        check("listne", Some("listen"));
        check("route", Some("routes"));
        check("tsl", Some("tls"));
        check("waf", None);
        check("", None);
        check(&"x".repeat(1000), None);
    }
}
