//! What shells do to words, for commands that are shown to people, who paste them.

use std::ffi::OsStr;

/// A word as it must be typed to reach a program unchanged.
pub(super) fn quoted(word: impl AsRef<OsStr>) -> String {
    let text = word.as_ref().to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:@%+".contains(c) || cfg!(windows) && c == '\\';
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    if cfg!(windows) { format!("\"{text}\"") } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// A path or name as it must be typed after a flag: one that begins with a hyphen would be a flag itself.
pub(super) fn quoted_value(word: impl AsRef<OsStr>) -> String {
    let text = word.as_ref().to_string_lossy();
    if text.starts_with('-') { quoted(format!("./{text}")) } else { quoted(&*text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn words_come_through_a_shell() {
        for (word, typed) in [
            ("a/b-1.gguf", "a/b-1.gguf"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("$x;~`#!*", "'$x;~`#!*'"),
            ("für=1", "für=1"),
            ("~/x", "'~/x'"),
            ("a\\b", r"'a\b'"),
        ] {
            assert_eq!(quoted(word), typed);
            let out = std::process::Command::new("sh").arg("-c").arg(format!("printf %s {typed}")).output();
            assert_eq!(String::from_utf8(out.unwrap().stdout).unwrap(), word);
        }
    }
}
