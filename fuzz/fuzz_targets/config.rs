//! `forebay.yaml`: the loader with the real configuration, every check of `forebay check`, and the values that people
//! write.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use forebay_app::{Config, check};
use forebay_config::{ByteSize, FixedEnvironment, HumanDuration, ListenAddr, Source, load};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    round_trip::<ByteSize>(text);
    round_trip::<HumanDuration>(text);
    round_trip::<ListenAddr>(text);

    let source = Source::new("forebay.yaml", text);
    let diagnostics = match load::<Config>(&source) {
        Ok(_) => {
            let env = FixedEnvironment::new().with_var("KEY", "a-secret-of-some-length");
            check::check(&source, &env).diagnostics
        }
        Err(diagnostics) => {
            assert!(diagnostics.has_errors(), "refused without an error");
            diagnostics
        }
    };
    let _ = (diagnostics.to_string(), diagnostics.to_ansi(), diagnostics.to_json());
});

/// What is shown for a value is read as the same value.
fn round_trip<T: FromStr + Display + Debug + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let shown = value.to_string();
        assert!(shown.parse::<T>().is_ok_and(|again| again == value), "{text:?} is shown as {shown:?}");
    }
}
