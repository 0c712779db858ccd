//! Output on stdout that may be cut short: `forebay check FILE | head`.

use std::io::Write;

/// Like `println!`, but a reader that has gone ends the process quietly instead of a panic.
macro_rules! line {
    ($($arg:tt)*) => {
        $crate::out::write(&format!("{}\n", format_args!($($arg)*)))
    };
}
pub(crate) use line;

pub(crate) fn write(text: &str) {
    let mut stdout = std::io::stdout();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        // What a process ends with that SIGPIPE ends.
        std::process::exit(141);
    }
}
