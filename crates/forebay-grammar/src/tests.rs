use forebay_tokens::{TokenType, Tokenizer, Vocab};
use forebay_types::TokenId;
use forebay_wire::Constraint;
use serde_json::{Value, json};

use super::*;

pub(crate) const END: TokenId = 256;
const OTHER_END: TokenId = 257;
const TURN: TokenId = 258;

/// One token per byte, two that end a text, one that begins a turn, and words that cross the borders of JSON's tokens.
pub(crate) fn tokenizer() -> Tokenizer {
    let mut next = 256u32;
    let mut letters: Vec<String> = (0..=255u8)
        .map(|byte| {
            let plain = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if plain {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("in the alphabet").to_string()
        })
        .collect();
    let mut types = vec![TokenType::Normal; 256];
    for special in ["<|end|>", "<|eot|>", "<|turn|>"] {
        letters.push(special.into());
        types.push(TokenType::Control);
    }
    for word in ["{\"", "\":", "\",", "true", "12", "]}", "\"}"] {
        letters.push(word.into());
        types.push(TokenType::Normal);
    }
    Tokenizer::new(Vocab {
        model: "gpt2".into(),
        pre: "default".into(),
        tokens: letters,
        token_types: types,
        eos: Some(END),
        eot: Some(OTHER_END),
        ..Vocab::default()
    })
    .expect("a vocabulary")
}

/// A small generator of numbers: the tests need many different choices, not good randomness.
struct Lots(u64);

impl Lots {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What a model with no sense writes that may only say what the constraint allows. It ends where it can after a while.
fn babble(grammars: &Grammars, tokenizer: &Tokenizer, constraint: &Constraint, seed: u64) -> String {
    let mut matcher = grammars.compile(constraint).expect("compiles");
    let mut lots = Lots(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut bytes = Vec::new();
    for step in 0..400 {
        let mask = matcher.mask().expect("a mask");
        let all: Vec<TokenId> =
            (0..tokenizer.vocab_size() as TokenId).filter(|&id| mask.allows(id)).collect();
        assert!(!all.is_empty(), "nothing may come after {:?}", String::from_utf8_lossy(&bytes));
        assert!(!all.contains(&TURN), "a control token is no text");
        assert_eq!(mask.allows(END), mask.allows(OTHER_END), "either end ends it");
        if mask.allows(END) && (step > 40 || all.len() == 2) {
            return String::from_utf8(bytes).expect("text");
        }
        // Later on what closes is preferred, or strings would never end.
        let closing = [b'"', b'}', b']'].map(TokenId::from).into_iter().find(|&id| mask.allows(id));
        let drawn = all[(lots.next() % all.len() as u64) as usize];
        let token = if step > 30 { closing.unwrap_or(drawn) } else { drawn };
        if token == END || token == OTHER_END {
            return String::from_utf8(bytes).expect("text");
        }
        bytes.extend_from_slice(tokenizer.token_bytes(token));
        matcher.accept(token).expect("was allowed");
    }
    panic!("no end: {}", String::from_utf8_lossy(&bytes));
}

#[test]
fn whatever_is_said_matches() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer).expect("has ends");
    let check = |constraint: Constraint, matches: &dyn Fn(&str) -> bool| {
        for seed in 1..40 {
            let text = babble(&grammars, &tokenizer, &constraint, seed);
            assert!(matches(&text), "{constraint:?}: {text:?}");
        }
    };
    let parsed = |text: &str| serde_json::from_str::<Value>(text).ok();
    // Its numbers may be too large for a float: only the form counts.
    check(Constraint::JsonObject, &|text| {
        text.starts_with('{') && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
    });
    let schema = json!({
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "tag": {"enum": ["a", "b"]}},
        "required": ["age", "tag"],
        "additionalProperties": false,
    });
    check(Constraint::JsonSchema(schema), &|text| {
        let Some(Value::Object(fields)) = parsed(text) else { return false };
        fields.len() == 2
            && fields["age"].as_u64().is_some_and(|age| age <= 99)
            && fields["tag"].as_str().is_some_and(|tag| tag == "a" || tag == "b")
    });
    check(Constraint::Regex("[a-c]{2}-[0-9]{3}".into()), &|text| {
        let (letters, digits) = text.split_once('-').unwrap_or_default();
        letters.len() == 2
            && letters.bytes().all(|b| (b'a'..=b'c').contains(&b))
            && digits.len() == 3
            && digits.bytes().all(|b| b.is_ascii_digit())
    });
    let choices = ["yes", "no \"quoted\"", "größer\n"].map(str::to_owned);
    check(Constraint::Choice(choices.to_vec()), &|text| choices.iter().any(|choice| choice == text));
    let lark = "start: sum\nsum: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[0-9]{1,2}/";
    check(Constraint::Grammar(lark.into()), &|text| {
        let terms: Vec<&str> = text.split('+').collect();
        (2..=4).contains(&terms.len()) && terms.iter().all(|t| t.parse::<u32>().is_ok_and(|n| n < 100))
    });
}

#[test]
fn white_space_between_json_tokens_is_bounded() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer).expect("has ends");
    let mut matcher = grammars.compile(&Constraint::JsonObject).expect("compiles");
    matcher.accept(TokenId::from(b'{')).expect("begins an object");
    let newline = (0..256).find(|&id| tokenizer.token_bytes(id) == b"\n").expect("is there");
    assert!(matcher.mask().expect("a mask").allows(newline));
    matcher.accept(newline).expect("once");
    assert!(!matcher.mask().expect("a mask").allows(newline));
}

#[test]
fn a_fork_goes_its_own_way() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer).expect("has ends");
    let constraint = Constraint::Choice(vec!["ab".into(), "cd".into()]);
    let mut one = grammars.compile(&constraint).expect("compiles");
    let mut other = one.fork();
    one.accept(TokenId::from(b'a')).expect("allowed");
    other.accept(TokenId::from(b'c')).expect("allowed");
    let allows =
        |matcher: &mut Matcher, byte: u8| matcher.mask().expect("a mask").allows(TokenId::from(byte));
    assert!(allows(&mut one, b'b') && !allows(&mut one, b'd'));
    assert!(allows(&mut other, b'd') && !allows(&mut other, b'b'));
    // The kept one is still at its beginning.
    let mut again = grammars.compile(&constraint).expect("is kept");
    assert!(allows(&mut again, b'a') && allows(&mut again, b'c'));
    assert!(one.accept(TokenId::from(b'z')).is_err());
}

#[test]
fn what_can_not_be_compiled_says_why() {
    let grammars = Grammars::new(&tokenizer()).expect("has ends");
    let check = |constraint: Constraint, expect: &str| {
        let error = grammars.compile(&constraint).expect_err("can't be compiled");
        assert!(matches!(error, GrammarError::Constraint(_)), "{error:?}");
        assert!(error.to_string().contains(expect), "{error}");
    };
    check(Constraint::JsonSchema(json!({"type": "nonsense"})), "nonsense");
    check(Constraint::JsonSchema(json!({"$ref": "#/nowhere"})), "nowhere");
    check(Constraint::JsonSchema(json!([])), "an object");
    check(Constraint::Regex("a(".into()), "unclosed group");
    check(Constraint::Grammar("start: missing".into()), "missing");
    check(Constraint::Grammar("root ::= a".into()), "line 1 of the EBNF grammar: rule `a` is not defined");
    check(Constraint::Grammar("root ::= root".into()), "no text matches it");
    check(Constraint::Grammar("start: start".into()), "no text matches it");
}

/// It may be refused or be slow to follow, but not hang or take the machine's memory.
#[test]
fn a_costly_expression_is_bounded() {
    let grammars = Grammars::new(&tokenizer()).expect("has ends");
    let Ok(mut matcher) = grammars.compile(&Constraint::Regex("(x?[ab]{1,900}y?){1,900}z".into())) else {
        return;
    };
    for _ in 0..50 {
        if matcher.accept(TokenId::from(b'a')).and_then(|()| matcher.mask()).is_err() {
            return;
        }
    }
}

#[test]
fn masks_are_sets() {
    let mask = Mask::of(&[1, 40], 50);
    assert!(mask.allows(1) && mask.allows(40) && !mask.allows(0) && !mask.allows(5000));
    let mut both = mask.clone();
    assert!(both.intersect(&Mask::of(&[40, 41], 50)));
    assert_eq!(both, Mask::of(&[40], 50));
    assert!(!both.intersect(&Mask::of(&[1], 50)));
    let mut logits = vec![1.0; 50];
    mask.apply(&mut logits);
    let left: Vec<usize> = (0..50).filter(|&id| logits[id] == 1.0).collect();
    assert_eq!(left, [1, 40]);
    assert!(logits.iter().all(|&logit| logit == 1.0 || logit == f32::NEG_INFINITY));
}

/// What leads deeper than a stack is refused, or is compiled on one that is deep enough.
#[test]
fn long_chains_do_not_overflow_the_stack() {
    let grammars = Grammars::new(&tokenizer()).expect("has ends");
    let check = |constraint: &Constraint, refused: bool| match grammars.compile(constraint) {
        Ok(_) => assert!(!refused),
        Err(error) => {
            assert!(error.to_string().contains("rules, references and brackets") && refused, "{error}")
        }
    };
    let lark = |rules: usize| {
        let rule = |n: usize| format!("r{n}: ((\"a\" r{})) \"b\"\n", n + 1);
        Constraint::Grammar(format!("start: r0\n{}r{rules}: \"c\"", (0..rules).map(rule).collect::<String>()))
    };
    let schema = |def: &dyn Fn(Value) -> Value, defs: usize| {
        let def = |n: usize| (format!("d{n}"), def(json!({"$ref": format!("#/$defs/d{}", n + 1)})));
        let mut all: serde_json::Map<String, Value> = (0..defs).map(def).collect();
        all.insert(format!("d{defs}"), json!({"type": "integer"}));
        Constraint::JsonSchema(json!({"$ref": "#/$defs/d0", "$defs": all}))
    };
    let object = |next| json!({"type": "object", "properties": {"a": next}, "required": ["a"]});
    check(&lark(3000), false);
    check(&lark(4000), true);
    check(&schema(&object, 1000), false);
    check(&schema(&object, 3000), true);
    // The most of other shapes: taken or not, but with an answer.
    let shapes: [(usize, &dyn Fn(Value) -> Value); 5] = [
        (9990, &|next| next),
        (3300, &|next| json!({"minimum": 1, "allOf": [next]})),
        (3300, &|next| json!({"anyOf": [next]})),
        (2400, &|next| json!({"anyOf": [next, {"type": "null"}]})),
        (4900, &|next| json!({"type": "array", "items": next})),
    ];
    for (defs, shape) in shapes {
        let told =
            grammars.compile(&schema(shape, defs)).map_or_else(|error| error.to_string(), |_| String::new());
        assert!(told.is_empty() || told.ends_with("schema too large"), "{told}");
    }
    // Without references there is no chain.
    let wide: Vec<Value> = (0..6000).map(|n| json!({"enum": [n]})).collect();
    assert_eq!(deep::levels(&Constraint::JsonSchema(json!({"anyOf": wide})), false), 0);
    // Grammars that are made here carry schemas of clients.
    let Constraint::JsonSchema(tool) = schema(&object, 3000) else { unreachable!() };
    let error = grammars.compile_lark(format!("start: %json {tool}")).expect_err("is too deep");
    assert!(error.to_string().contains("rules, references and brackets"), "{error}");
}
