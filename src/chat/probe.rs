//! What a template can do, found by rendering small conversations before the first question.

use super::{ChatTemplate, Message, on_deep_stack};
use crate::error::{Error, ErrorCode, Result};
use serde_json::Value;

/// A text that no template has a reason to change.
const WORD: &str = "probe";
/// Keys of turns that say something to the model. Others, such as names and ids, are a template's to use or not.
const MEANT: [&str; 9] = [
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_plan",
    "tools",
    "documents",
    "citations",
];

impl ChatTemplate {
    /// Whether a conversation can begin: with one question.
    ///
    /// # Errors
    /// The template refuses it.
    pub fn check(&self) -> Result<()> {
        self.render(&[Message::new("user", "hello")], None, true).map(|_| ())
    }

    /// Of each part of a conversation that says something to the model, its name and whether the template prints it: turns
    /// other than the assistant's by their role, keys of turns as `ROLE.KEY`, and `tools`. Names that are `known` need no
    /// look.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub(crate) fn left_out(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        known: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<(String, bool)>> {
        let mut found: Vec<(String, bool)> = Vec::new();
        let mut names: Vec<String> = tools.iter().map(|_| "tools".to_owned()).collect();
        for message in messages {
            let said = message.content.as_deref().is_some_and(|c| !c.trim().is_empty());
            if message.role != "assistant" && said {
                names.push(message.role.clone());
            }
            let meant = message.extra.keys().filter(|key| MEANT.contains(&key.as_str()));
            names.extend(meant.map(|key| format!("{}.{key}", message.role)));
        }
        names.sort_unstable();
        names.dedup();
        names.retain(|name| !known(name));
        if names.is_empty() {
            return Ok(found);
        }
        on_deep_stack(|| {
            // Some show the system's turn only to who is to answer, and not once that is done.
            let asked = messages.iter().position(|m| m.role == "assistant").unwrap_or(0);
            let whole = self.render_here(messages, tools, false)?;
            let question = self.render_here(&messages[..asked], tools, true).unwrap_or_default();
            for name in names {
                let (mut less, mut tools) = (messages.to_vec(), tools);
                match name.split_once('.') {
                    Some((role, key)) => less.iter_mut().filter(|m| m.role == role).for_each(|m| {
                        m.extra.remove(key);
                    }),
                    None if name == "tools" => tools = None,
                    // Another text in its place, for an order of roles may be asked for.
                    None => less.iter_mut().filter(|m| m.role == name).for_each(|m| {
                        m.content = Some(if m.content.as_deref() == Some(WORD) { "else" } else { WORD }.to_owned());
                    }),
                }
                // What fails without it is not left out.
                let printed = self.render_here(&less, tools, false).map_or(true, |text| text != whole)
                    || self.render_here(&less[..asked], tools, true).is_ok_and(|text| text != question);
                found.push((name, printed));
            }
            Ok(found)
        })?
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
                "expected none, for this model's chat template {why}; leave the system prompt out and begin the first question \
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
                    assert!(e.contains(why) && (!any || e.contains("leave the system prompt out")), "{text}: {e}");
                }
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }
}
