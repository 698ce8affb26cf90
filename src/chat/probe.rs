//! What a template can do, found by rendering small conversations before the first question.

use super::{ChatTemplate, Message};
use crate::error::{Error, ErrorCode, Result};

/// A text that no template has a reason to change.
const WORD: &str = "probe";

impl ChatTemplate {
    /// Whether a conversation can begin: with one question.
    ///
    /// # Errors
    /// The template refuses it.
    pub fn check(&self) -> Result<()> {
        self.render(&[Message::new("user", "hello")], None, true).map(|_| ())
    }

    /// Whether the model can be given a system prompt.
    ///
    /// # Errors
    /// The template refuses one, or leaves it out without a word.
    pub fn check_system(&self) -> Result<()> {
        // What fails without a system prompt is not its fault.
        self.check()?;
        let refused = |why: &str| {
            let message = format!(
                "expected none, for this model's chat template {why}; leave `--system` out and begin the first question \
                 with its text"
            );
            Error::new(ErrorCode::Config, "setting `system`", message)
        };
        match self.render(&[Message::new("system", WORD), Message::new("user", "hello")], None, true) {
            Ok(prompt) if prompt.text.contains(WORD) => Ok(()),
            Ok(_) => Err(refused("leaves a system prompt out without a word")),
            Err(e) => Err(refused("takes no system prompt").caused_by(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_prompt_is_taken_refused_or_left_out() {
        let body = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}";
        let refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}";
        for (text, system, any) in [
            (body.to_owned(), Ok(()), true),
            (format!("{refuses}{body}"), Err("takes no system prompt"), true),
            ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}".to_owned(), Err("leaves"), true),
            ("{{ raise_exception('never') }}".to_owned(), Err("never"), false),
        ] {
            let template = ChatTemplate::new(text.clone(), Vec::new(), "test".into()).unwrap();
            assert_eq!(template.check().is_ok(), any, "{text}");
            match (template.check_system(), system) {
                (Ok(()), Ok(())) => {}
                (Err(e), Err(why)) => {
                    let e = e.to_string();
                    assert!(e.contains(why) && (!any || e.contains("leave `--system` out")), "{text}: {e}");
                }
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }
}
