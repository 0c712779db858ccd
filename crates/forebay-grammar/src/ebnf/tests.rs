use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::tests::{END, tokenizer};
use crate::{Constraint, Grammars};

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&tokenizer()).expect("has ends"));

/// Whether the grammar lets the text be all of the output.
fn takes(grammar: &str, text: &str) -> bool {
    let constraint = Constraint::Grammar(grammar.to_owned());
    let mut matcher = GRAMMARS.compile(&constraint).unwrap_or_else(|error| panic!("{error}: {grammar}"));
    // Its first tokens are the bytes. Where no text goes on, there is no mask.
    for token in text.bytes().map(u32::from) {
        if !matcher.mask().is_ok_and(|mask| mask.allows(token)) {
            return false;
        }
        matcher.accept(token).expect("was allowed");
    }
    matcher.mask().is_ok_and(|mask| mask.allows(END))
}

const SQL: &str = r#"
    root ::= select_statement

    select_statement ::= "SELECT " column " from " table " where " condition

    column ::= "col_1 " | "col_2 "

    table ::= "table_1 " | "table_2 "

    condition ::= column "= " number

    number ::= "1 " | "2 "
"#;
const JSON: &str = r#"
# As llama.cpp has it, but for the depth of white space.
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escape sequences
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn grammars_mean_what_they_say() {
    let check = |grammar: &str, good: &[&str], bad: &[&str]| {
        for text in good {
            assert!(takes(grammar, text), "{grammar}: refuses {text:?}");
        }
        for text in bad {
            assert!(!takes(grammar, text), "{grammar}: takes {text:?}");
        }
    };
    let query = "SELECT col_1  from table_2  where col_2 = 1 ";
    check(SQL, &[query], &["", "SELECT col_3 ", query.trim_end(), "select"]);
    check(
        JSON,
        &[
            "{}",
            "{\"a\": [1, -2.5e+3, {\"b\":null}],\n \"é\\u00e9\\n\":\"\"}",
            "{\"a\":{\"a\":{\"a\":[[[]]]}} }",
        ],
        &["", "{", "[]", "{\"a\"}", "{\"a\":01}", "{\"a\":tru}", "{\"a\":\"\t\"}", "{\"a\":\"\x7f\"}"],
    );
    // Names, comments, lines.
    let named =
        "root::=a-b A_B a.b .#c\n# a-b ::= \"z\"\na-b::=\"1\"\n\tA_B ::=\n  \"2\"\n | \"#\"\na.b ::= \"3\"";
    check(named, &["123x", "1#3#", "123\n", "123é"], &["123", "12", "z23x"]);
    check("root ::= \"a\"|\n\"b\"\r\n\r\n", &["a", "b"], &["ab", ""]);
    // Every escape, in strings and in classes.
    let escapes = r#"root ::= "\"\\\/\'\?\[\n\r\t\a\b\f\v\0\e\x41\u00e9\U0001F600é" [\]\-\^\\\x2f\n"]{7}"#;
    let text = "\"\\/'?[\n\r\t\x07\x08\x0c\x0b\0\x1b\x41é😀é";
    check(escapes, &[&format!("{text}]-^\\/\n\"")], &[&format!("{text}]-^\\/\na")]);
    check(r#"root ::= "\x1F600""#, &["😀"], &["\x1f600"]);
    // Classes.
    check("root ::= [a-c-]", &["a", "b", "c", "-"], &["d", "", "ab"]);
    check("root ::= [-a]", &["a", "-"], &["b"]);
    check("root ::= [^a-c\\n]", &["d", "-", "é", "\""], &["a", "\n", ""]);
    check("root ::= [^]", &["d", "\n", "😀"], &["", "ab"]);
    check("root ::= [α-ω/&&~~]", &["β", "ω", "/", "&", "~"], &["a"]);
    check("root ::= [.] [*] [$] [|] [[] [:digit:]", &[".*$|[d", ".*$|[:"], &[".*$|[1", "x*$|[d"]);
    // Repetition.
    check("root ::= \"a\"? \"b\"* \"c\"+", &["c", "abbcc", "bc"], &["", "aac", "ab"]);
    check(
        "root ::= [a]{2} [b]{1,2} [c]{1,} [d]{0}",
        &["aabc", "aabbccc"],
        &["abc", "aab", "aabbbc", "aabcd"],
    );
    check("root ::= ( [a] [b] ) { 1 , 2 }\n", &["ab", "abab"], &["", "aba", "ababab"]);
    check("root ::= (\"a\"+)? (\"b\" | )", &["", "b", "aaab", "a"], &["bb"]);
    check("root ::= ()", &[""], &["a"]);
    check("root ::= e \"\" \"a\" e\ne ::= \"\"", &["a"], &["", "aa"]);
    // One word is the beginning of another.
    check("root ::= [a-z]* \"end\"", &["end", "bend", "endend", "enend"], &["", "en", "enda"]);
    check("root ::= (\"a\" | \"ab\") \"c\" | \"a\" \"bd\"", &["ac", "abc", "abd"], &["ab", "ad"]);
    // Recursion.
    check("root ::= root \"a\" | \"a\"", &["a", "aaa"], &["", "b"]);
    check("root ::= root | \"a\"", &["a"], &["aa"]);
    check("root ::= \"x\" root | root \"y\" | \"aab\" | \"a\"", &["a", "xxaaby", "ay"], &["xy", "aa"]);
    check("root ::= [a] text [d]\ntext ::= char | char text\nchar ::= [a-d]", &["abd", "addd"], &["ad", "a"]);
    check("root ::= \"(\" root \")\" | root root | \"\"", &["", "()", "(()())()"], &["(", "())", "x"]);
    let sum = "root ::= sum\nsum ::= sum [-+] term | term\nterm ::= [0-9]+ | \"(\" sum \")\"";
    check(sum, &["1", "1+23-4", "((1)-2)"], &["", "1+", "(1", "1 + 2"]);
    let mutual = "root ::= \"a\" other | \"a\"\nother ::= \"b\" root | \"b\"";
    check(mutual, &["a", "ab", "abab", "aba"], &["aa", "", "b"]);
    let optional = "root ::= ws list ws\nlist ::= \"[\" ws (list (\",\" ws list)*)? ws \"]\" ws\nws ::= [ ]*";
    check(optional, &["[]", " [ [ ] ,  [] ]  "], &["", "[", "[,]"]);
}

#[test]
fn mistakes_are_named_with_their_lines() {
    let check = |grammar: &str, line: usize, expect: &str| {
        let error = ebnf_to_lark(grammar).expect_err(grammar);
        assert_eq!((error.line, error.mistake.to_string().as_str()), (line, expect), "{grammar}");
    };
    check("a ::= \"x\"\n", 2, "there is no rule `root`");
    check("root ::= a\n| b\na ::= \"x\"", 2, "rule `b` is not defined");
    check("root ::= \"a\"\nb ::= \"b\"\nroot ::= b", 3, "rule `root` is defined already, in line 1");
    check(
        "root ::= a\na ::= b ::= \"b\"",
        2,
        "expected a rule's name at the beginning of a line, found `b ::=`",
    );
    check("\"a\" ::= \"b\"", 1, "expected the name of a rule, found `\"`");
    check("root = \"a\"\nb ::= \"b\"", 1, "expected `::=` behind the name of a rule, found `=`");
    let element = "expected a string, a class, a group or the name of a rule";
    check("root ::= 'a'", 1, &format!("{element}, found `'`"));
    check("root ::=\n*", 2, &format!("{element}, found `*`"));
    check("root ::= \"a\" )", 1, "expected the name of a rule, found `)`");
    check("root ::= \"a\n\"", 1, "`\"` is not closed");
    check("root ::= [a\n]", 1, "`[` is not closed");
    check("root ::= [a-", 1, "`[` is not closed");
    check("root ::=\n ( \"a\"\nb ::= \"b\"", 2, "`(` is not closed");
    check("root ::= \"a\"{2", 1, "`{` is not closed");
    for escape in ["d", "xg", "u12", "uD800", "U00110000", "ué"] {
        let error = ebnf_to_lark(&format!("root ::= [\\{escape}]")).expect_err(escape);
        assert!(matches!(&error.mistake, Mistake::Escape(told) if told.starts_with(&escape[..1])), "{error}");
    }
    check("root ::= \"\\", 1, "`\\` is no escape");
    check("root ::= []", 1, "class `[]` has no characters");
    check("root ::= [z-a]", 1, "range `z-a` is the wrong way round");
    let repetition = "a repetition is `{m}`, `{m,n}` or `{m,}`, with m <= n <= 10000";
    for counts in ["{}", "{,2}", "{2,1}", "{-1}", "{+1}", "{10001}", "{99999999999}", "{1,2,3}", "{a}"] {
        check(&format!("root ::= \"a\"{counts}"), 1, repetition);
    }
    check("root ::= \"a\"+ +", 1, "a repetition of a repetition: put `(` and `)` around the first");
    for (grammar, what) in [
        ("root[max_tokens=3] ::= [a]", "an option of a rule"),
        ("root ::= Regex(\"[0-9]\")", "a macro"),
        ("root ::= \"a\" (=\"b\")", "lookahead `(=...)`"),
        ("root ::= <think>", "a token `<...>`"),
    ] {
        check(grammar, 1, &format!("{what} is not supported"));
    }
    let options = "expected the name of a rule, without options, before `::=`, found `:`";
    check("root ::= a\na[lazy] ::= \"a\"", 2, options);
}

#[test]
fn there_are_limits() {
    let check = |grammar: &str, line: usize, mistake: Mistake| {
        assert_eq!(ebnf_to_lark(grammar), Err(EbnfError { line, mistake }));
    };
    let long = |bytes: usize| format!("root ::= \"a\"{}", " ".repeat(bytes - 12));
    assert!(takes(&long(BYTES_MAX), "a"));
    check(&long(BYTES_MAX + 1), 1, Mistake::TooLong);
    let groups = |n: usize| format!("root ::=\n{}\"a\"{}", "(".repeat(n), ")+".repeat(n));
    assert!(takes(&groups(GROUPS_MAX), "aa"));
    check(&groups(GROUPS_MAX + 1), 2, Mistake::TooManyGroups);
    let chain = |rules: usize, last: &str| {
        let rule = |n: usize| format!("r{n} ::= \"a\" r{} \"b\"\n", n + 1);
        format!("root ::= r0\n{}r{rules} ::= {last}", (0..rules).map(rule).collect::<String>())
    };
    for last in ["\"c\"", "\"c\" | \"(\" root \")\""] {
        assert!(takes(&chain(90, last), &format!("{}c{}", "a".repeat(90), "b".repeat(90))));
        check(&chain(100, last), 102, Mistake::TooManySteps("r100".into()));
    }
    // What can't be reached counts for nothing.
    let apart = chain(1000, "\"c\"").replacen("root", "r-1", 1);
    assert!(takes(&format!("root ::= \"a\"\n{apart}"), "a"));
    // It may be refused, but not take long.
    let _ = GRAMMARS.compile(&Constraint::Grammar(
        "root ::= a{10000}\na ::= b{10000}\nb ::= \"(\" (b | a)* \")\" | [a-z]{10000}".into(),
    ));
}

#[test]
fn lark_is_told_apart() {
    let check = |grammar: &str, expect: bool| assert_eq!(is_ebnf(grammar), expect, "{grammar}");
    check("root ::= \"a\"", true);
    check("# lark: start: \"a\"\n\n  root\n  ::= \"a\"", true);
    check("root::=x", true);
    check("start: \"a ::= b\"", false);
    check("// root ::= \"a\"\nstart: /a ::= b/ # ::=", false);
    check("start: a", false);
}

#[test]
fn the_lark_is_one_lexeme_where_it_can_be() {
    let check = |grammar: &str, expect: &str| {
        assert_eq!(ebnf_to_lark(grammar).expect("is right"), expect);
    };
    check(
        "root ::= a-B [^\\]x]{2,} | \"\\x7f\\n\"\na-B ::= [a-z0]",
        "start: R0_ROOT\nR0_ROOT: R1_A_B /[^\\x{5d}x]/{2,} | \"\\u007f\\n\"\nR1_A_B: /[a-z0]/\n",
    );
    check(
        "root ::= \"(\" sp root \")\" sp | sp\nsp ::= \" \" sp | \"\"",
        "start: r0_root\nL0: \"(\" R1_SP\nL1: \")\" R1_SP\nr0_root: L0 r0_root L1 | R1_SP\nR1_SP: \" \"* \"\"\n",
    );
}

/// What the property makes, with the text in EBNF and the meaning by definition.
#[derive(Debug, Clone)]
enum Part {
    Text(String),
    Class(bool, char, char),
    Rule(usize),
    Sequence(Vec<Part>),
    Choice(Vec<Part>),
    Repeat(Box<Part>, u32, Option<u32>),
}

impl Part {
    fn text(&self) -> String {
        let all =
            |parts: &[Part], between: &str| parts.iter().map(Part::text).collect::<Vec<_>>().join(between);
        match self {
            Part::Text(text) => format!("\"{text}\""),
            Part::Class(negated, from, to) => format!("[{}{from}-{to}]", if *negated { "^" } else { "" }),
            Part::Rule(number) => format!("r-{number}"),
            Part::Sequence(parts) => format!("({})", all(parts, " ")),
            Part::Choice(parts) => format!("({})", all(parts, "|")),
            Part::Repeat(part, least, None) => format!("({}){{{least},}}", part.text()),
            Part::Repeat(part, least, Some(most)) => format!("({}){{{least},{most}}}", part.text()),
        }
    }

    /// Where it may end that begins at one of `starts`; positions are bits. `rules[r][s]`: what is known of rule `r` from `s`.
    fn ends(&self, text: &[u8], starts: u32, rules: &[Vec<u32>]) -> u32 {
        let each = |ends: &dyn Fn(usize) -> u32| {
            (0..=text.len()).filter(|at| starts >> at & 1 == 1).fold(0, |all, at| all | ends(at))
        };
        match self {
            Part::Text(word) => {
                each(&|at| u32::from(text[at..].starts_with(word.as_bytes())) << (at + word.len()))
            }
            Part::Class(negated, from, to) => each(&|at| {
                let fits = text.get(at).is_some_and(|b| (*from..=*to).contains(&char::from(*b)) != *negated);
                u32::from(fits) << (at + 1)
            }),
            Part::Rule(number) => each(&|at| rules[*number][at]),
            Part::Sequence(parts) => parts.iter().fold(starts, |at, part| part.ends(text, at, rules)),
            Part::Choice(parts) => parts.iter().fold(0, |all, part| all | part.ends(text, starts, rules)),
            Part::Repeat(part, least, most) => {
                // As many as there are positions find all there are.
                let most = most.unwrap_or(least + text.len() as u32 + 1);
                let (mut at, mut all) = (starts, if *least == 0 { starts } else { 0 });
                for n in 1..=most {
                    at = part.ends(text, at, rules);
                    all |= if n >= *least { at } else { 0 };
                }
                all
            }
        }
    }
}

/// Whether rule 0 takes the text, by trying all there is until nothing new is found.
fn derives(rules: &[Part], text: &str) -> bool {
    let text = text.as_bytes();
    let mut known = vec![vec![0u32; text.len() + 1]; rules.len()];
    loop {
        let mut more = known.clone();
        for (rule, ends) in rules.iter().zip(&mut more) {
            for (at, ends) in ends.iter_mut().enumerate() {
                *ends |= rule.ends(text, 1 << at, &known);
            }
        }
        if more == known {
            return known[0][0] >> text.len() & 1 == 1;
        }
        known = more;
    }
}

fn ebnf(rules: &[Part]) -> String {
    let lines = rules.iter().enumerate().map(|(number, rule)| format!("r-{number} ::= {}\n", rule.text()));
    format!("root ::= r-0\n{}", lines.collect::<String>())
}

/// `rules`: those that may be named.
fn part(rules: std::ops::Range<usize>) -> BoxedStrategy<Part> {
    let leaf = prop_oneof![
        "[ab]{0,3}".prop_map(Part::Text),
        (any::<bool>(), prop_oneof![Just(('a', 'a')), Just(('a', 'b')), Just(('b', 'c'))])
            .prop_map(|(negated, (from, to))| Part::Class(negated, from, to)),
    ];
    let leaf =
        if rules.is_empty() { leaf.boxed() } else { prop_oneof![leaf, rules.prop_map(Part::Rule)].boxed() };
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Part::Sequence),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Part::Choice),
            (inner, 0u32..3, proptest::option::of(0u32..3)).prop_map(|(part, least, more)| Part::Repeat(
                Box::new(part),
                least,
                more.map(|more| least + more)
            )),
        ]
    })
    .boxed()
}

/// Rules that name those behind them only.
fn regular() -> impl Strategy<Value = Vec<Part>> {
    (part(1..3), part(2..3), part(0..0)).prop_map(|(a, b, c)| vec![a, b, c])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn regular_grammars_take_what_they_derive(rules in regular(), texts in proptest::collection::vec("[abc]{0,7}", 8)) {
            let grammar = ebnf(&rules);
        for text in &texts {
            prop_assert_eq!(takes(&grammar, text), derives(&rules, text), "{:?} {}", text, grammar);
        }
    }

    /// What repeats at its ends is regular.
    #[test]
    fn a_rule_may_repeat_at_its_ends(
        parts in proptest::collection::vec((part(0..0), 0..3), 1..4),
        last in part(0..0),
        texts in proptest::collection::vec("[abc]{0,7}", 8),
    ) {
            let branch = |(part, place): (Part, i32)| match place {
            0 => Part::Sequence(vec![part, Part::Rule(0)]),
            1 => Part::Sequence(vec![Part::Rule(0), part]),
            _ => part,
        };
        let mut branches: Vec<Part> = parts.into_iter().map(branch).collect();
        branches.push(last);
        let rules = [Part::Choice(branches)];
        let grammar = ebnf(&rules);
        for text in &texts {
            prop_assert_eq!(takes(&grammar, text), derives(&rules, text), "{:?} {}", text, grammar);
        }
    }

    /// What comes out of any grammar is a text of it.
    #[test]
    fn recursive_grammars_take_nothing_else(
        rules in (part(0..3), part(0..3), part(0..3)),
        texts in proptest::collection::vec("[abc]{0,6}", 8),
    ) {
            let rules = [rules.0, rules.1, rules.2];
        let grammar = ebnf(&rules);
        // Many match nothing at all.
        if GRAMMARS.compile(&Constraint::Grammar(grammar.clone())).is_err() {
            return Ok(());
        }
        for text in &texts {
            prop_assert!(!takes(&grammar, text) || derives(&rules, text), "{:?} {}", text, grammar);
        }
    }

    /// Whatever it is, it is read or refused here, and what is read is Lark.
    #[test]
    fn any_text_is_read_or_refused(text in "(root|a|b| ::= |\"|\\[|\\]|\\(|\\)|\\||\\*|\\{1,|\\}|\\\\|x4|-|\\^|\n|#|é){0,40}") {
        let _ = ebnf_to_lark(&text);
        let grammar = format!("root ::= {text}");
        if ebnf_to_lark(&grammar).is_ok() {
            let told = GRAMMARS.compile(&Constraint::Grammar(grammar)).map_or_else(|error| error.to_string(), |_| String::new());
            prop_assert!(told.is_empty() || told.ends_with(": no text matches it"), "{}", told);
        }
    }
}
