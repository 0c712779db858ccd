//! The JSON object around a call, `{"name": NAME, "arguments": {…}}`, read by character: what it says is known as soon as
//! it has come.

/// What a character meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    More,
    /// The arguments begin with it, and the name is known.
    Arguments,
    /// The object ends with it.
    Closed,
    /// It can't stand here: this is no call, or the call is over.
    Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In front of `{`.
    Open,
    /// In front of a key, or of `}`.
    Key,
    InKey,
    Colon,
    Value,
    InName,
    /// In arguments that came before the name.
    InEarly,
    /// In a value of no interest.
    InOther,
    InScalar,
    /// In front of `,` or `}`.
    Next,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    Other,
}

/// Where a string, object or array ends. Looks at quotes and brackets only.
#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Extent {
    /// Takes the next character; true where it is the last. The first is a quote or an opening bracket.
    fn ends_with(&mut self, c: char) -> bool {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => {
                self.in_string = !self.in_string;
                return !self.in_string && self.depth == 0;
            }
            _ if self.in_string => {}
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[derive(Debug)]
pub(crate) struct Envelope {
    at: At,
    extent: Extent,
    key: Key,
    /// The key or name that is being read, with its quotes.
    string: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    streamed: bool,
}

impl Envelope {
    /// In front of `{`.
    pub(crate) fn new() -> Self {
        Self {
            at: At::Open,
            extent: Extent::default(),
            key: Key::Other,
            string: String::new(),
            name: None,
            early: None,
            streamed: false,
        }
    }

    /// The name, and the arguments where they came before it; once the object ends, or its arguments begin.
    pub(crate) fn take(&mut self) -> Option<(String, String)> {
        let arguments = if self.streamed { String::new() } else { self.early.take()? };
        Some((self.name.take()?, arguments))
    }

    /// Takes a character of arguments behind the first; true where it is their last.
    pub(crate) fn on_argument(&mut self, c: char) -> bool {
        let ended = self.extent.ends_with(c);
        if ended {
            self.at = At::Next;
        }
        ended
    }

    pub(crate) fn in_string(&self) -> bool {
        self.extent.in_string
    }

    pub(crate) fn on_char(&mut self, c: char) -> Step {
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match self.at {
            At::Open | At::Key | At::Colon | At::Value | At::Next if space => {}
            At::Open if c == '{' => self.at = At::Key,
            At::Key | At::Next | At::InScalar if c == '}' => return Step::Closed,
            At::Key if c == '"' => self.begin_string(At::InKey),
            At::InKey => return self.on_key(c),
            At::Colon if c == ':' => self.at = At::Value,
            At::Value => return self.on_value(c),
            At::InName => return self.on_name(c),
            At::InEarly => {
                self.early.get_or_insert_default().push(c);
                self.skip(c);
            }
            At::InOther => self.skip(c),
            At::InScalar | At::Next if c == ',' => self.at = At::Key,
            At::InScalar if space => self.at = At::Next,
            At::InScalar if c.is_ascii_alphanumeric() || "+-.".contains(c) => {}
            At::Open | At::Key | At::Colon | At::InScalar | At::Next => return Step::Broken,
        }
        Step::More
    }

    fn begin_string(&mut self, at: At) {
        self.string.clear();
        self.string.push('"');
        self.begin('"', at);
    }

    fn begin(&mut self, c: char, at: At) {
        self.at = at;
        self.extent = Extent::default();
        self.extent.ends_with(c);
    }

    fn skip(&mut self, c: char) {
        if self.extent.ends_with(c) {
            self.at = At::Next;
        }
    }

    fn on_key(&mut self, c: char) -> Step {
        self.string.push(c);
        if !self.extent.ends_with(c) {
            return Step::More;
        }
        self.at = At::Colon;
        let Ok(key) = serde_json::from_str::<String>(&self.string) else { return Step::Broken };
        self.key = match &*key {
            "name" if self.name.is_none() && !self.streamed => Key::Name,
            // The first of the two counts.
            "arguments" | "parameters" if self.early.is_none() && !self.streamed => Key::Arguments,
            _ => Key::Other,
        };
        Step::More
    }

    fn on_name(&mut self, c: char) -> Step {
        self.string.push(c);
        if self.extent.ends_with(c) {
            self.at = At::Next;
            self.name = serde_json::from_str(&self.string).ok().filter(|name: &String| !name.is_empty());
            if self.name.is_none() {
                return Step::Broken;
            }
        }
        Step::More
    }

    fn on_value(&mut self, c: char) -> Step {
        match (self.key, c) {
            (Key::Name, '"') => self.begin_string(At::InName),
            (Key::Arguments, '{') if self.name.is_some() => {
                self.streamed = true;
                self.begin(c, At::Next);
                return Step::Arguments;
            }
            (Key::Arguments, '{') => {
                self.early = Some(c.into());
                self.begin(c, At::InEarly);
            }
            (Key::Other, '"' | '{' | '[') => self.begin(c, At::InOther),
            (Key::Other, '-' | '0'..='9' | 'a'..='z') => self.at = At::InScalar,
            _ => return Step::Broken,
        }
        Step::More
    }
}
