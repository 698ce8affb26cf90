//! The last line of `train --dry-run`: whether samples begin and end as the model was trained to see them.

use crate::chat::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::train::Checks;

/// What is as it should be, and what is not.
pub(super) struct DataCheck {
    /// Facts in order: beginning, template, end.
    pub facts: Vec<String>,
    /// What the model was not trained to see.
    pub faults: Vec<String>,
}

impl DataCheck {
    pub fn new(checks: &Checks, tokenizer: &Tokenizer, template: &ChatTemplate) -> Self {
        let (mut facts, mut faults) = (Vec::new(), Vec::new());
        let all = checks.chats + checks.texts;
        let name = |id: u32| tokenizer.decode_with_special(&[id]).map_or_else(|_| id.to_string(), |t| format!("`{t}`"));
        match tokenizer.bos() {
            _ if checks.begun_twice > 0 => {
                faults.push(format!("{} of {all} begin with the beginning-of-text token twice", checks.begun_twice));
            }
            Some(bos) if checks.begun == all => facts.push(format!("begins with {} once", name(bos))),
            // A template's own way is what the model knows; the tokenizer's beginning is for texts.
            Some(bos) if checks.begun > 0 || checks.texts > 0 && !tokenizer.prefix_ids().is_empty() => {
                faults.push(format!("{} of {all} do not begin with {}", all - checks.begun, name(bos)));
            }
            Some(bos) if !tokenizer.prefix_ids().is_empty() => {
                facts.push(format!("the chat template writes no {}, which the tokenizer puts before texts", name(bos)));
            }
            _ => facts.push("begins without a token of its own, as this model's texts do".to_owned()),
        }
        match checks.chats {
            0 => facts.push("no template (texts are taken as they are)".to_owned()),
            _ if template.is_own() => facts.push("the model's own chat template".to_owned()),
            _ => faults.push(format!(
                "the model has no chat template, so conversations stand in the layout of {}, and `chat` asks in it, too",
                template.stand_in()
            )),
        }
        let ends: Vec<String> = checks.ends.iter().map(|&id| name(id)).collect();
        if checks.unended > 0 {
            faults.push(format!(
                "{} of {all} have no end at which generation stops, so the model learns to go on for ever",
                checks.unended
            ));
        }
        if checks.shortened > 0 {
            faults.push(format!("of {} answers the chat template leaves a part out", checks.shortened));
        }
        if !checks.left_out.is_empty() {
            let keys: Vec<&str> = checks.left_out.iter().map(String::as_str).collect();
            faults.push(format!("the chat template leaves out `{}`", keys.join("`, `")));
        }
        if !ends.is_empty() {
            facts.push(format!("ends with {}, which is learned", ends.join(" or ")));
        }
        Self { facts, faults }
    }

    /// Says on stderr what the model was not trained to see.
    pub fn warn(&self) {
        self.faults.iter().for_each(|fault| eprintln!("warning: {fault}; `train --dry-run` shows the samples"));
    }

    /// One line.
    pub fn line(&self) -> String {
        let facts = self.facts.join("; ");
        match &self.faults[..] {
            [] => format!("check: as the model was trained to see it: {facts}"),
            faults => format!("check: NOT as the model was trained to see it: {} (else: {facts})", faults.join("; ")),
        }
    }
}
