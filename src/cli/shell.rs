//! What shells do to words, for commands that are shown and for paths that no shell has seen.

use std::ffi::OsStr;
use std::path::PathBuf;

/// A word as it must be typed to reach a program unchanged.
pub(super) fn quoted(word: impl AsRef<OsStr>) -> String {
    let text = word.as_ref().to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A path that was typed where no shell replaces `~` by the user's folder.
pub(super) fn expanded(typed: &str) -> PathBuf {
    match (typed.strip_prefix('~'), std::env::home_dir()) {
        (Some(""), Some(home)) => home,
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(&rest[1..]),
        _ => typed.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_through_a_shell_and_home_is_found() {
        for (word, typed) in [
            ("a/b-1.gguf", "a/b-1.gguf"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("$x;~", "'$x;~'"),
            ("für=1", "für=1"),
        ] {
            assert_eq!(quoted(word), typed);
        }
        assert_eq!(expanded("a/~b"), PathBuf::from("a/~b"));
        assert_eq!(expanded("~other/x"), PathBuf::from("~other/x"));
        if let Some(home) = std::env::home_dir() {
            assert_eq!(expanded("~/x y"), home.join("x y"));
        }
    }
}
