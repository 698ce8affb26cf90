//! Where the assistant's words are in a rendered conversation, whatever the template.
//!
//! They are never found by a search for the markers that a template prints: the text of a message may look like one.

use super::{ChatTemplate, Message, on_deep_stack, plain};
use crate::error::{Error, ErrorCode, Result};
use serde_json::Value;
use std::ops::Range;

/// A conversation as text, and what of it the assistant wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendering {
    /// As the model reads it.
    pub text: String,
    /// Bytes that are plain text though they are written like special tokens.
    pub plain: Vec<Range<usize>>,
    /// Bytes that the assistant wrote, in order.
    pub answers: Vec<Range<usize>>,
    /// The template's author marked them; else they reach from what comes before a turn to what comes after it.
    pub marked: bool,
    /// The first turn that is answered here, and how many turns there are.
    pub turns: Range<usize>,
}

impl Rendering {
    /// Takes the marks of special tokens out.
    fn unmark(&mut self) {
        let mut places: Vec<&mut usize> = self.answers.iter_mut().flat_map(|a| [&mut a.start, &mut a.end]).collect();
        let rendered = plain::unmark(&self.text, &mut places);
        (self.text, self.plain) = (rendered.text, rendered.plain);
    }
}

impl ChatTemplate {
    /// Renders `messages` with the answers of the assistant turns from number `from` on. Where the template has
    /// `{% generation %}` blocks these are the answers; else an answer is what its turn adds to the text of the turns
    /// before it, as the model reads them when it is to answer. A turn that does not extend that text is found by its
    /// content, which another takes the place of. Turns that are not to be learned are left out.
    ///
    /// There is one rendering, unless the template tells an earlier turn differently once more turns follow (as those do
    /// that remove earlier thoughts): then each such turn comes in a rendering of its own that ends with it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; also where a turn does not even follow the turns before it.
    pub fn render_with_answers(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        from: usize,
    ) -> Result<Vec<Rendering>> {
        self.with_marks(messages, tools, |messages, tools| {
            let mut renderings = on_deep_stack(|| {
                if self.marked.iter().any(|name| self.name(tools).is_ok_and(|n| n == name)) {
                    let marked = self.by_markers(messages, tools, from)?;
                    if !marked.answers.is_empty() {
                        return Ok(vec![marked]);
                    }
                }
                self.by_differences(messages, tools, from)
            })??;
            renderings.iter_mut().for_each(Rendering::unmark);
            Ok(renderings)
        })
    }

    fn by_markers(&self, messages: &[Message], tools: Option<&Value>, from: usize) -> Result<Rendering> {
        let (text, mut answers) = self.render_marked(messages, tools, false, None)?;
        if from > 0 {
            let before = self.render_here(&messages[..from], tools, false)?;
            let given = common_prefix(&before, &text);
            answers.retain(|a| a.start >= given);
        }
        for (i, _) in messages.iter().enumerate().skip(from).filter(|(_, m)| m.role == "assistant" && !m.learned) {
            let border = |end: usize| {
                let before = self.render_here(&messages[..end], tools, false)?;
                Ok::<_, Error>(common_prefix(&before, &text))
            };
            let turn = border(i)?..border(i + 1)?;
            answers.retain(|a| !turn.contains(&a.start));
        }
        answers.retain(|a| !a.is_empty());
        Ok(Rendering { text, plain: Vec::new(), answers, marked: true, turns: from..messages.len() })
    }

    fn by_differences(&self, messages: &[Message], tools: Option<&Value>, from: usize) -> Result<Vec<Rendering>> {
        let text = self.render_here(messages, tools, false)?;
        let (mut renderings, mut answers, mut first) = (Vec::new(), Vec::new(), messages.len());
        let turns = messages.iter().enumerate().skip(from).filter(|(_, m)| m.role == "assistant" && m.learned);
        let rendering = |text, answers, turns| Rendering { text, plain: Vec::new(), answers, marked: false, turns };
        for (i, _) in turns {
            let (start, after) = self.turn(messages, tools, i)?;
            // Some templates end a conversation differently from how they continue it; what both share is the turn.
            let shared = common_prefix(&after, &text);
            if shared > start && (shared == after.len() || shared >= self.end_of_content(messages, tools, i, &after)?) {
                answers.push(start..shared);
                first = first.min(i);
            } else {
                let answer = start..after.len();
                renderings.push(rendering(after, vec![answer], i..i + 1));
            }
        }
        if !answers.is_empty() {
            renderings.push(rendering(text, answers, first..messages.len()));
        }
        Ok(renderings)
    }

    /// The text up to assistant turn `i` and where in it that turn's answer begins.
    fn turn(&self, messages: &[Message], tools: Option<&Value>, i: usize) -> Result<(usize, String)> {
        let before = self.render_here(&messages[..i], tools, true)?;
        let after = self.render_here(&messages[..=i], tools, false)?;
        if after.starts_with(&before) {
            return Ok((before.len(), after));
        }
        let start = self.start_of_content(messages, tools, i, &after)?;
        // A template may show the system's turn in the last turn alone, and that only if a user's (Mistral's do): then
        // the answer belongs behind what it answers as the model reads that, not as it looks once it was answered.
        let given = i.checked_sub(1).and_then(|last| messages[last].content.as_deref()).unwrap_or_default().trim();
        let spaces = after[..start].len() - after[..start].trim_end().len();
        let same = |at: usize| before.bytes().rev().zip(after[..at].bytes().rev()).take_while(|(a, b)| a == b).count();
        let at = (start - spaces..=start).filter(|at| after.is_char_boundary(*at)).max_by_key(|at| same(*at));
        let at = at.unwrap_or(start);
        if !given.is_empty() && String::from_utf8_lossy(&before.as_bytes()[before.len() - same(at)..]).contains(given) {
            return Ok((before.len(), before + &after[at..]));
        }
        // Else it asks for an answer with other words than it tells one, such as the start of a thought.
        let told = common_prefix(&self.render_here(&messages[..i], tools, false)?, &after);
        if given.is_empty() || start < told || !after[..told].contains(given) {
            return Err(self.rewritten(i));
        }
        Ok((start, after))
    }

    /// Where in `after`, which ends with turn `i`, that turn's content begins: what other contents leave the same before.
    fn start_of_content(&self, messages: &[Message], tools: Option<&Value>, i: usize, after: &str) -> Result<usize> {
        let mut other = messages[..=i].to_vec();
        let mut start = after.len();
        for content in ["x", "y"] {
            other[i] = Message::new("assistant", content);
            let other = self.render_here(&other, tools, false)?;
            start = start.min(common_prefix(&other, after));
        }
        Ok(start)
    }

    /// Where in `after`, which ends with turn `i`, that turn's content is over and only what the template puts behind
    /// any turn follows: what another content leaves the same.
    fn end_of_content(&self, messages: &[Message], tools: Option<&Value>, i: usize, after: &str) -> Result<usize> {
        let mut other = messages[..=i].to_vec();
        let last = messages[i].content.as_deref().and_then(|c| c.trim_end().chars().next_back());
        other[i] = Message::new("assistant", if last == Some('x') { "y" } else { "x" });
        let other = self.render_here(&other, tools, false)?;
        let same = after.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
        Ok(after.len() - same)
    }

    fn rewritten(&self, turn: usize) -> Error {
        let message = format!(
            "chat template: expected turn {} to extend the text before it, got other text, so the answer's place is \
             unknown; use a template that leaves earlier turns alone",
            turn + 1
        );
        Error::new(ErrorCode::Data, &self.place, message)
    }
}

/// Bytes that two texts begin with, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut n = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    while !b.is_char_boundary(n) {
        n -= 1;
    }
    n
}
