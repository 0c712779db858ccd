//! EBNF's text to rules.

use std::collections::HashMap;

use super::{BYTES_MAX, EbnfError, GROUPS_MAX, Grammar, Mistake, Node, REPEATS_MAX, Rule};

/// What xgrammar has besides, and reads like a call.
const MACROS: [&str; 6] = ["TagDispatch", "Token", "ExcludeToken", "TokenTagDispatch", "Regex", "Substring"];
const ROOT: &str = "root";

pub(super) fn parse(text: &str) -> Result<Grammar, EbnfError> {
    if text.len() > BYTES_MAX {
        return Err(EbnfError { line: 1, mistake: Mistake::TooLong });
    }
    let mut parser = Parser { text, at: 0, line: 1, numbers: HashMap::new(), seen: Vec::new() };
    parser.space();
    while parser.peek().is_some() {
        parser.rule()?;
    }
    let line = parser.line;
    let known = |seen: Seen<'_>| {
        let name = seen.name.to_owned();
        match seen.body {
            Some(body) => Ok(Rule { name, line: seen.line, body }),
            None => Err(EbnfError { line: seen.line, mistake: Mistake::UnknownRule(name) }),
        }
    };
    let root = parser.numbers.get(ROOT).copied();
    let rules = parser.seen.into_iter().map(known).collect::<Result<Vec<Rule>, EbnfError>>()?;
    let root = root.ok_or(EbnfError { line, mistake: Mistake::NoRoot })?;
    Ok(Grammar { rules, root })
}

/// A rule that was named.
struct Seen<'a> {
    name: &'a str,
    /// Where it is defined, or until it is, where it was first named.
    line: usize,
    body: Option<Node>,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    numbers: HashMap<&'a str, usize>,
    seen: Vec<Seen<'a>>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        self.line += usize::from(next == '\n');
        Some(next)
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Goes on behind white space and comments.
    fn space(&mut self) {
        while let Some(next) = self.peek() {
            match next {
                '#' => self.at += self.rest().find('\n').unwrap_or(self.rest().len()),
                ' ' | '\t' | '\r' | '\n' => drop(self.next()),
                _ => break,
            }
        }
    }

    fn error<T>(&self, mistake: Mistake) -> Result<T, EbnfError> {
        Err(EbnfError { line: self.line, mistake })
    }

    fn unexpected<T>(&self, expected: &'static str) -> Result<T, EbnfError> {
        let found = match self.peek() {
            None => "the end".to_owned(),
            Some(found) if found.is_control() => format!("`{}`", found.escape_debug()),
            Some(found) => format!("`{found}`"),
        };
        self.error(Mistake::Unexpected { expected, found })
    }

    fn name(&mut self) -> Option<&'a str> {
        let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let rest = self.rest();
        let name = &rest[..rest.find(|c| !of_name(c)).unwrap_or(rest.len())];
        self.at += name.len();
        Some(name).filter(|name| !name.is_empty())
    }

    fn number_of(&mut self, name: &'a str, line: usize) -> usize {
        *self.numbers.entry(name).or_insert_with(|| {
            self.seen.push(Seen { name, line, body: None });
            self.seen.len() - 1
        })
    }

    fn rule(&mut self) -> Result<(), EbnfError> {
        let line_before = &self.text[..self.at];
        let begins_line = line_before.rsplit('\n').next().is_none_or(|before| before.trim().is_empty());
        let line = self.line;
        let Some(name) = self.name() else { return self.unexpected("the name of a rule") };
        if !begins_line {
            let found = format!("`{name} ::=`");
            return self
                .error(Mistake::Unexpected { expected: "a rule's name at the beginning of a line", found });
        }
        self.space();
        if self.peek() == Some('[') {
            return self.error(Mistake::NotSupported("an option of a rule"));
        }
        if !self.eat("::=") {
            return self.unexpected("`::=` behind the name of a rule");
        }
        let number = self.number_of(name, line);
        if self.seen[number].body.is_some() {
            let mistake = Mistake::DuplicateRule { name: name.to_owned(), first: self.seen[number].line };
            return Err(EbnfError { line, mistake });
        }
        let body = self.choice(0)?;
        self.seen[number].line = line;
        self.seen[number].body = Some(body);
        Ok(())
    }

    /// `a | b`, up to the end of a group or of the rule.
    fn choice(&mut self, groups: usize) -> Result<Node, EbnfError> {
        let mut branches = vec![self.sequence(groups)?];
        while self.eat("|") {
            branches.push(self.sequence(groups)?);
        }
        Ok(if branches.len() == 1 { branches.remove(0) } else { Node::Choice(branches) })
    }

    fn sequence(&mut self, groups: usize) -> Result<Node, EbnfError> {
        let mut items = Vec::new();
        loop {
            self.space();
            let Some(item) = self.element(groups)? else { break };
            self.space();
            let item = self.repeated(item)?;
            items.push(item);
        }
        Ok(if items.len() == 1 { items.remove(0) } else { Node::Sequence(items) })
    }

    /// `None` where the sequence ends.
    fn element(&mut self, groups: usize) -> Result<Option<Node>, EbnfError> {
        let (at, line) = (self.at, self.line);
        if let Some(name) = self.name() {
            if self.peek() == Some('(') && MACROS.contains(&name) {
                return self.error(Mistake::NotSupported("a macro"));
            }
            self.space();
            if self.rest().starts_with("::=") {
                // The next rule.
                (self.at, self.line) = (at, line);
                return Ok(None);
            }
            return Ok(Some(match name {
                // As in llama.cpp.
                "." => any(),
                _ => Node::Rule(self.number_of(name, line)),
            }));
        }
        match self.peek() {
            None | Some('|' | ')') => Ok(None),
            Some('"') => self.literal().map(Some),
            Some('[') => self.class().map(Some),
            Some('(') => self.group(groups).map(Some),
            Some(':') => self.unexpected("the name of a rule, without options, before `::=`"),
            Some('<') => self.error(Mistake::NotSupported("a token `<...>`")),
            Some(_) => self.unexpected("a string, a class, a group or the name of a rule"),
        }
    }

    fn group(&mut self, groups: usize) -> Result<Node, EbnfError> {
        let line = self.line;
        if groups == GROUPS_MAX {
            return self.error(Mistake::TooManyGroups);
        }
        self.eat("(");
        if self.eat("=") {
            return self.error(Mistake::NotSupported("lookahead `(=...)`"));
        }
        let inner = self.choice(groups + 1)?;
        if self.eat(")") { Ok(inner) } else { Err(EbnfError { line, mistake: Mistake::Unclosed("`(`") }) }
    }

    fn repeated(&mut self, item: Node) -> Result<Node, EbnfError> {
        let Some((least, most)) = self.repetition()? else { return Ok(item) };
        self.space();
        if self.repetition()?.is_some() {
            return self.error(Mistake::RepeatedTwice);
        }
        Ok(Node::Repeat(Box::new(item), least, most))
    }

    fn repetition(&mut self) -> Result<Option<(u32, Option<u32>)>, EbnfError> {
        let found = match self.peek() {
            Some('?') => (0, Some(1)),
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('{') => return self.counts().map(Some),
            _ => return Ok(None),
        };
        self.next();
        Ok(Some(found))
    }

    /// `{m}`, `{m,n}`, `{m,}`.
    fn counts(&mut self) -> Result<(u32, Option<u32>), EbnfError> {
        let Some((inner, _)) = self.rest()[1..].split_once('}') else {
            return self.error(Mistake::Unclosed("`{`"));
        };
        let number = |text: &str| {
            let text = text.trim();
            // No sign.
            let digits = text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u32>().ok().filter(|&n| digits && n <= REPEATS_MAX)
        };
        let counts = match inner.split_once(',') {
            None => number(inner).map(|n| (n, Some(n))),
            Some((least, most)) if most.trim().is_empty() => number(least).map(|least| (least, None)),
            Some((least, most)) => number(least).zip(number(most)).map(|(least, most)| (least, Some(most))),
        };
        match counts {
            Some((least, most)) if most.is_none_or(|most| least <= most) => {
                let end = self.at + inner.len() + 2;
                while self.at < end && self.next().is_some() {}
                Ok((least, most))
            }
            _ => self.error(Mistake::Repetition),
        }
    }

    fn literal(&mut self) -> Result<Node, EbnfError> {
        self.eat("\"");
        let mut text = String::new();
        loop {
            match self.peek() {
                None | Some('\n' | '\r') => return self.error(Mistake::Unclosed("`\"`")),
                Some('"') => break,
                Some(_) => text.push(self.character()?),
            }
        }
        self.eat("\"");
        Ok(Node::Text(text))
    }

    fn class(&mut self) -> Result<Node, EbnfError> {
        self.eat("[");
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                None | Some('\n' | '\r') => return self.error(Mistake::Unclosed("`[`")),
                Some(']') => break,
                Some(_) => {}
            }
            let from = self.character()?;
            // A dash before the end is itself.
            let is_range = self.rest().starts_with('-') && !self.rest().starts_with("-]") && self.eat("-");
            if is_range && matches!(self.peek(), None | Some('\n' | '\r')) {
                return self.error(Mistake::Unclosed("`[`"));
            }
            let to = if is_range { self.character()? } else { from };
            if from > to {
                return self.error(Mistake::Reversed { from, to });
            }
            ranges.push((from, to));
        }
        self.eat("]");
        match (negated, ranges.is_empty()) {
            (true, true) => Ok(any()),
            (false, true) => self.error(Mistake::EmptyClass),
            _ => Ok(Node::Class { negated, ranges }),
        }
    }

    /// A character of a string or a class, perhaps escaped. The caller has seen that there is one.
    fn character(&mut self) -> Result<char, EbnfError> {
        let plain = self.next().unwrap_or_default();
        if plain != '\\' {
            return Ok(plain);
        }
        let Some(escaped) = self.peek().filter(|&c| c != '\n') else {
            return self.error(Mistake::Escape(String::new()));
        };
        self.next();
        let digits = match escaped {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'a' => return Ok('\x07'),
            'b' => return Ok('\x08'),
            'v' => return Ok('\x0b'),
            'f' => return Ok('\x0c'),
            'e' => return Ok('\x1b'),
            '0' => return Ok('\0'),
            'x' => self.rest().bytes().take_while(u8::is_ascii_hexdigit).count(),
            'u' => 4,
            'U' => 8,
            _ if escaped.is_ascii_punctuation() => return Ok(escaped),
            _ => return self.error(Mistake::Escape(escaped.into())),
        };
        let code = self.rest().get(..digits).unwrap_or_default();
        let is_hex = code.bytes().all(|b| b.is_ascii_hexdigit());
        match u32::from_str_radix(code, 16).ok().filter(|_| is_hex).and_then(char::from_u32) {
            Some(character) => {
                self.at += digits;
                Ok(character)
            }
            None => {
                let shown: String = self.rest().chars().take(digits.clamp(1, 8)).collect();
                self.error(Mistake::Escape(format!("{escaped}{}", shown.escape_debug())))
            }
        }
    }
}

fn any() -> Node {
    Node::Class { negated: false, ranges: vec![('\0', char::MAX)] }
}
