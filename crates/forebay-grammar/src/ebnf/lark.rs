//! Rules to llguidance's Lark, in as few lexemes as can be.

use std::collections::HashMap;

use super::{EbnfError, Grammar, Mistake, Node, Rule, STEPS_MAX};

pub(super) fn render_lark(grammar: Grammar) -> Result<String, EbnfError> {
    let Grammar { mut rules, root } = grammar;
    for (number, rule) in rules.iter_mut().enumerate() {
        let body = std::mem::replace(&mut rule.body, Node::Sequence(Vec::new()));
        rule.body = without_ends(number, body);
    }
    let mut walk = Walk { found: vec![Found::Not; rules.len()], rules: &rules };
    walk.rule(root, 0)?;
    let found = walk.found;
    let mut writer = Writer { rules: &rules, found: &found, lexemes: HashMap::new(), lark: String::new() };
    let start = writer.name(root);
    writer.line("start", &start);
    for number in (0..rules.len()).filter(|&number| found[number] != Found::Not) {
        let (name, body) = (writer.name(number), &rules[number].body);
        let body = writer.node(body, Place::Alone, found[number] == Found::Lexeme);
        writer.line(&name, &body);
    }
    Ok(writer.lark)
}

/// The body of a rule where it names itself at neither end: `r ::= a r | r b | c` is `a* c b*`.
fn without_ends(number: usize, body: Node) -> Node {
    let itself = Node::Rule(number);
    let (mut before, mut middle, mut behind) = (Vec::new(), Vec::new(), Vec::new());
    let branches = match body {
        Node::Choice(branches) => branches,
        other => vec![other],
    };
    for branch in branches {
        match branch {
            // Says nothing.
            branch if branch == itself => {}
            Node::Sequence(mut items) if items.first() == Some(&itself) => {
                items.remove(0);
                behind.push(Node::Sequence(items));
            }
            Node::Sequence(mut items) if items.last() == Some(&itself) => {
                items.pop();
                before.push(Node::Sequence(items));
            }
            branch => middle.push(branch),
        }
    }
    if middle.is_empty() {
        // No text matches it; llguidance says so.
        return itself;
    }
    let choice = |mut branches: Vec<Node>| {
        if branches.len() == 1 { branches.remove(0) } else { Node::Choice(branches) }
    };
    let any_of = |branches: Vec<Node>| {
        (!branches.is_empty()).then(|| Node::Repeat(Box::new(choice(branches)), 0, None))
    };
    let parts = [any_of(before), Some(choice(middle)), any_of(behind)];
    let mut parts: Vec<Node> = parts.into_iter().flatten().collect();
    if parts.len() == 1 { parts.remove(0) } else { Node::Sequence(parts) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Not,
    OnTheWay,
    /// It leads to a rule that leads back to itself.
    Recursive,
    /// It does not: one lexeme.
    Lexeme,
}

/// The way through what `root` leads to, in llguidance's order.
struct Walk<'a> {
    rules: &'a [Rule],
    found: Vec<Found>,
}

impl Walk<'_> {
    /// Whether it is a lexeme.
    fn rule(&mut self, number: usize, steps: usize) -> Result<bool, EbnfError> {
        let rules = self.rules;
        let rule = &rules[number];
        if self.found[number] == Found::Not {
            if steps >= STEPS_MAX {
                let mistake = Mistake::TooManySteps(rule.name.clone());
                return Err(EbnfError { line: rule.line, mistake });
            }
            self.found[number] = Found::OnTheWay;
            let is_lexeme = self.node(&rule.body, steps + 1)?;
            self.found[number] = if is_lexeme { Found::Lexeme } else { Found::Recursive };
        }
        Ok(self.found[number] == Found::Lexeme)
    }

    fn node(&mut self, node: &Node, steps: usize) -> Result<bool, EbnfError> {
        match node {
            Node::Text(_) | Node::Class { .. } => Ok(true),
            Node::Rule(number) => self.rule(*number, steps),
            Node::Repeat(inner, ..) => self.node(inner, steps),
            Node::Sequence(items) | Node::Choice(items) => {
                // Each has to be seen.
                items.iter().try_fold(true, |all, item| Ok(self.node(item, steps + 1)? && all))
            }
        }
    }
}

/// What a node stands in, and so whether it needs parentheses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Alone,
    Sequence,
    Repeat,
}

struct Writer<'a> {
    rules: &'a [Rule],
    found: &'a [Found],
    /// Parts of recursive rules that are lexemes, and their names.
    lexemes: HashMap<String, String>,
    lark: String,
}

impl Writer<'_> {
    fn line(&mut self, name: &str, body: &str) {
        self.lark.extend([name, ": ", body, "\n"]);
    }

    /// Lexemes have upper case names. The number keeps apart what differs in other characters only.
    fn name(&self, number: usize) -> String {
        let name: String = self.rules[number]
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' })
            .collect();
        match self.found[number] {
            Found::Lexeme => format!("R{number}_{}", name.to_ascii_uppercase()),
            _ => format!("r{number}_{name}"),
        }
    }

    fn is_lexeme(&self, node: &Node) -> bool {
        match node {
            Node::Text(_) | Node::Class { .. } => true,
            Node::Rule(number) => self.found[*number] == Found::Lexeme,
            Node::Repeat(inner, ..) => self.is_lexeme(inner),
            Node::Sequence(items) | Node::Choice(items) => items.iter().all(|item| self.is_lexeme(item)),
        }
    }

    fn node(&mut self, node: &Node, place: Place, in_lexeme: bool) -> String {
        let (text, own) = match node {
            _ if !in_lexeme && self.is_lexeme(node) => return self.lexeme(std::slice::from_ref(node)),
            Node::Text(text) => return quoted(text),
            Node::Class { negated, ranges } => return class(*negated, ranges),
            Node::Rule(number) => return self.name(*number),
            Node::Sequence(items) if items.is_empty() => return quoted(""),
            Node::Repeat(_, _, Some(0)) => return quoted(""),
            Node::Sequence(items) | Node::Choice(items) if items.len() == 1 => {
                return self.node(&items[0], place, in_lexeme);
            }
            Node::Sequence(items) => (self.sequence(items, in_lexeme), Place::Sequence),
            Node::Choice(branches) => {
                let branches: Vec<String> =
                    branches.iter().map(|branch| self.node(branch, Place::Sequence, in_lexeme)).collect();
                (branches.join(" | "), Place::Alone)
            }
            Node::Repeat(inner, least, most) => {
                let inner = self.node(inner, Place::Repeat, in_lexeme);
                (format!("{inner}{}", repetition(*least, *most)), Place::Sequence)
            }
        };
        if own < place { format!("({text})") } else { text }
    }

    fn sequence(&mut self, items: &[Node], in_lexeme: bool) -> String {
        let mut parts = Vec::new();
        let runs: Vec<&[Node]> = items.chunk_by(|a, b| self.is_lexeme(a) && self.is_lexeme(b)).collect();
        for run in runs {
            match run {
                [one] => parts.push(self.node(one, Place::Sequence, in_lexeme)),
                _ if in_lexeme => parts.extend(run.iter().map(|one| self.node(one, Place::Sequence, true))),
                _ => parts.push(self.lexeme(run)),
            }
        }
        parts.join(" ")
    }

    /// A lexeme of its own of neighbours.
    fn lexeme(&mut self, items: &[Node]) -> String {
        let body = match items {
            [Node::Rule(number)] => return self.name(*number),
            _ => self.node(&Node::Sequence(items.to_vec()), Place::Alone, true),
        };
        if body == quoted("") {
            return body;
        }
        if let Some(known) = self.lexemes.get(&body) {
            return known.clone();
        }
        let name = format!("L{}", self.lexemes.len());
        self.line(&name, &body);
        self.lexemes.insert(body, name.clone());
        name
    }
}

fn repetition(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, Some(1)) => "?".to_owned(),
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

/// In JSON's notation, without the control characters that Lark doesn't take.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\x7f', "\\u007f")
}

fn class(negated: bool, ranges: &[(char, char)]) -> String {
    let shown =
        |c: char| if c.is_ascii_alphanumeric() { c.into() } else { format!("\\x{{{:x}}}", u32::from(c)) };
    let range = |&(from, to): &(char, char)| {
        if from == to { shown(from) } else { format!("{}-{}", shown(from), shown(to)) }
    };
    let ranges: String = ranges.iter().map(range).collect();
    format!("/[{}{ranges}]/", if negated { "^" } else { "" })
}
