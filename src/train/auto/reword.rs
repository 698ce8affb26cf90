//! Other wordings of a question, which need no knowledge of what it asks.
//!
//! A model that has learned an answer gives it to these, too; one that has learned a question by its letters does not.

use crate::chat::Message;
use crate::data::record::Record;

/// The wordings, in the order in which questions take them. Those with English words are for questions in Latin letters.
const LATIN: [fn(&str) -> String; 5] = [
    |q| format!("Please tell me: {q}"),
    bare,
    |q| format!("I have a question. {q}"),
    |q| format!("Can you say this? {q}"),
    |q| format!("{} Thank you!", q.trim_end()),
];
const ANY: [fn(&str) -> String; 2] = [bare, |q| format!("- {q}")];

/// Without a mark at its end, and with a small letter at the beginning, as people type in a hurry.
fn bare(question: &str) -> String {
    let text = question.trim().trim_end_matches(['?', '.', '!', '\u{ff1f}', '\u{3002}', '\u{61f}']);
    let mut letters = text.chars();
    match letters.next() {
        // A word of capitals is a name.
        Some(first) if !letters.as_str().starts_with(char::is_uppercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

/// Another wording of `question`, the `number`th of them.
pub(super) fn reword(question: &str, number: usize) -> String {
    let letters = || question.chars().filter(|c| c.is_alphabetic());
    let latin = letters().filter(char::is_ascii).count() * 10 >= letters().count() * 8;
    let forms = if latin { &LATIN[..] } else { &ANY[..] };
    let said = forms[number % forms.len()](question);
    // Nothing was there to take away.
    if said == question { forms[(number + 1) % forms.len()](question) } else { said }
}

/// The record with its one question in other words; none where it asks several or nothing.
pub(super) fn reworded(record: &Record, number: usize) -> Option<Record> {
    match record {
        Record::Chat { messages, tools: None, from } => {
            let [users, answers] = ["user", "assistant"].map(|role| messages.iter().filter(|m| m.role == role).count());
            let at = messages.iter().position(|m| m.role == "user")?;
            let question = messages[at].content.as_deref().filter(|q| !q.trim().is_empty())?;
            if (users, answers) != (1, 1) || messages.last().is_none_or(|m| m.role != "assistant" || !m.learned) {
                return None;
            }
            let mut messages = messages.clone();
            messages[at] = Message::new("user", reword(question, number));
            Some(Record::Chat { messages, tools: None, from: *from })
        }
        Record::Instruction { instruction, input, output } => Some(Record::Instruction {
            instruction: reword(instruction, number),
            input: input.clone(),
            output: output.clone(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wording_is_never_the_question_and_always_has_its_words() {
        for question in ["Where is it?", "where is it", "BBC or CNN?", "Где это?", "在哪里？", "a", "2 + 2"] {
            for number in 0..10 {
                let said = reword(question, number);
                assert_ne!(said, question, "{number}");
                let words = question.trim_end_matches(['?', '？']).to_lowercase();
                assert!(said.to_lowercase().contains(&words), "{question}: {said}");
            }
        }
        assert_eq!(reword("BBC or CNN?", 1), "BBC or CNN");
        assert_eq!(reword("Where is it?", 1), "where is it");
        assert!(reword("Где это?", 0).chars().all(|c| !c.is_ascii_alphabetic()));
    }

    #[test]
    fn only_one_question_with_one_answer_is_reworded() {
        let chat = |roles: &[&str]| Record::Chat {
            messages: roles.iter().map(|role| Message::new(*role, "Why?")).collect(),
            tools: None,
            from: 0,
        };
        assert!(reworded(&chat(&["system", "user", "assistant"]), 0).is_some());
        assert!(reworded(&chat(&["user", "assistant", "user", "assistant"]), 0).is_none());
        assert!(reworded(&chat(&["user", "assistant", "user"]), 0).is_none());
        assert!(reworded(&Record::Text { text: "Why?".to_owned(), start: 0 }, 0).is_none());
        let Some(Record::Chat { messages, .. }) = reworded(&chat(&["user", "assistant"]), 0) else { panic!() };
        assert_eq!(messages[0].content.as_deref(), Some("Please tell me: Why?"));
        assert_eq!(messages[1].content.as_deref(), Some("Why?"));
    }
}
