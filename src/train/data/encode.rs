//! Records to samples: rendered, tokenized as one text, masked, and split where they are too long.
//!
//! A token is learned if at least one byte of it belongs to an answer. Places of tokens are taken before the last step of
//! the tokenizer, which may cut spaces off them.

use super::record::Record;
use super::split::{self, Coded, Splits};
use super::{Asked, Checks, Sample, SampleLimits, data_error};
use crate::chat::{ChatTemplate, Message, Rendering};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ops::Range;

/// A rendering as tokens, and its turns.
type Part = (Coded, Range<usize>);

/// Turns records of one model's data into samples.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    /// Longest sample, in tokens.
    limit: usize,
    vocab: usize,
    /// What the tokenizer puts before any text.
    prefix: Vec<u32>,
    pub splits: Splits,
    pub checks: Checks,
    /// What the template was seen to print, by name.
    printed: BTreeSet<String>,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, template: &'a ChatTemplate, limits: SampleLimits) -> Result<Self> {
        let prefix = tokenizer.prefix_ids().to_vec();
        let least = prefix.len() + 2;
        if limits.tokens < least {
            let expected = format!("at least {least} tokens, to learn one from another");
            return Err(Error::config("seq", expected, limits.tokens));
        }
        Ok(Self {
            tokenizer,
            template,
            limit: limits.tokens,
            vocab: limits.vocab,
            prefix,
            splits: Splits::default(),
            checks: Checks::default(),
            printed: BTreeSet::new(),
        })
    }

    /// Appends the samples of one record.
    pub fn encode(&mut self, record: Record, out: &mut Vec<Sample>) -> Result<()> {
        let before = out.len();
        self.samples(record, out)?;
        match out[before..].iter().flat_map(|s| &s.ids).find(|&&id| id as usize >= self.vocab) {
            None => Ok(()),
            Some(id) => {
                let message = format!(
                    "expected ids below the vocabulary's {}, got `{id}`; use the tokenizer of this model",
                    self.vocab
                );
                Err(data_error("tokens", message))
            }
        }
    }

    fn samples(&mut self, record: Record, out: &mut Vec<Sample>) -> Result<()> {
        match record {
            Record::Chat { messages, tools, from } => self.chat(&messages, tools.as_ref(), from, out),
            Record::Instruction { instruction, input, output } if self.template.is_own() || input.is_empty() => {
                let question = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
                self.chat(&[Message::new("user", question), Message::new("assistant", output)], None, 0, out)
            }
            Record::Instruction { instruction, input, output } => {
                let prompt = alpaca_prompt(&instruction, &input);
                let start = prompt.len();
                self.text(&(prompt + &output), start, out)
            }
            Record::Text { text, start } => self.text(&text, start, out),
        }
    }

    fn chat(&mut self, messages: &[Message], tools: Option<&Value>, from: usize, out: &mut Vec<Sample>) -> Result<()> {
        let mut answers = messages[from..].iter().filter(|m| m.role == "assistant").peekable();
        if answers.peek().is_none() {
            let message =
                "expected a turn with role `assistant`, got none, so there is nothing to learn; add an answer";
            return Err(data_error("messages", message));
        }
        if answers.all(|m| !m.learned) {
            let message = "expected an answer to learn, got only answers that are marked as not to be learned; take the \
                           mark off one, or the record out";
            return Err(data_error("messages", message));
        }
        self.all_printed(messages, tools)?;
        let (parts, shortened) = self.rendered(messages, tools, from)?;
        self.checks.shortened += shortened;
        if parts.iter().all(|(c, _)| c.learned() == 0) {
            return Err(nothing_learned());
        }
        for (coded, turns) in parts {
            self.checks.chats += 1;
            self.check(&coded);
            if coded.ids.len() <= self.limit {
                self.push(coded, out);
            } else {
                self.splits.samples += 1;
                let before = out.len();
                self.split_turns(&messages[..turns.end], tools, turns.start, out)?;
                self.splits.parts += out.len() - before;
            }
        }
        Ok(())
    }

    /// Splits a conversation between exchanges (what a user says and what follows up to the next user's turn). Each part
    /// begins with the system's turns and has as many exchanges as fit.
    fn split_turns(
        &mut self,
        messages: &[Message],
        tools: Option<&Value>,
        from: usize,
        out: &mut Vec<Sample>,
    ) -> Result<()> {
        let head = messages.iter().take_while(|m| matches!(m.role.as_str(), "system" | "developer")).count();
        let answered = messages.iter().rposition(|m| m.role == "assistant" && m.learned).map_or(0, |i| i + 1);
        self.splits.left_out_turns += messages.len() - answered;
        let mut borders = exchanges(&messages[..answered], head);
        borders.push(answered);
        let last = borders.len() - 1;
        let part = |range: Range<usize>| {
            let turns = borders[range.start]..borders[range.end];
            let learned = if from > turns.start { head + from - turns.start } else { 0 };
            ([&messages[..head], &messages[turns]].concat(), learned)
        };
        let mut start = borders[..last].partition_point(|&b| b <= from).saturating_sub(1);
        while start < last {
            let (mut end, mut begin, mut best) = (start, start, None);
            while end < last {
                let (turns, learned) = part(start..end + 1);
                let coded = self.coded(&turns, tools, learned)?;
                if !self.fits(&coded) {
                    break;
                }
                (best, end) = (Some(coded), end + 1);
            }
            // Where only later turns are learned, as many of the earlier ones as fit are read before them.
            while best.is_some() && begin > 0 && from > borders[begin - 1] {
                let (turns, learned) = part(begin - 1..end);
                let coded = self.coded(&turns, tools, learned)?;
                if !self.fits(&coded) {
                    self.splits.left_out_turns += borders[begin] - borders[0];
                    break;
                }
                (best, begin) = (Some(coded), begin - 1);
            }
            let coded = match best {
                Some(coded) => coded,
                None => {
                    let (turns, learned) = part(start..start + 1);
                    end = start + 1;
                    self.one_exchange(&turns, head, tools, learned)?
                }
            };
            for coded in coded {
                self.push_windows(coded, out);
            }
            start = end;
        }
        Ok(())
    }

    /// An exchange that does not fit behind the system's turns: without them if that helps, else as it is.
    fn one_exchange(
        &mut self,
        turns: &[Message],
        head: usize,
        tools: Option<&Value>,
        learned: usize,
    ) -> Result<Vec<Coded>> {
        if head > 0 || tools.is_some() {
            let bare = self.coded(&turns[head..], None, learned.saturating_sub(head))?;
            if self.fits(&bare) {
                self.splits.without_system += 1;
                return Ok(bare);
            }
        }
        self.coded(turns, tools, learned)
    }

    fn coded(&self, messages: &[Message], tools: Option<&Value>, from: usize) -> Result<Vec<Coded>> {
        Ok(self.rendered(messages, tools, from)?.0.into_iter().map(|(coded, _)| coded).collect())
    }

    fn fits(&self, coded: &[Coded]) -> bool {
        coded.iter().all(|c| c.ids.len() <= self.limit)
    }

    /// A conversation as tokens, with the turns of each rendering, and how many answers are printed in part. Where the
    /// template gives answers no end at which generation stops, each answer is a rendering of its own that the end-of-text
    /// token closes: without one the model would learn to go on for ever.
    fn rendered(&self, messages: &[Message], tools: Option<&Value>, from: usize) -> Result<(Vec<Part>, usize)> {
        // A part of a conversation may hold no answer to learn: then there is nothing to render for.
        let learned = |i: &usize| messages[*i].role == "assistant" && messages[*i].learned;
        let turns: Vec<usize> = (from..messages.len()).filter(learned).collect();
        if turns.is_empty() {
            return Ok((Vec::new(), 0));
        }
        let renderings = self.template.render_with_answers(messages, tools, from)?;
        let coded = renderings.iter().map(|r| self.code(r, messages)).collect::<Result<Vec<_>>>()?;
        let mut shortened = coded.iter().map(|(.., shortened)| shortened).sum();
        let Some(eos) = self.tokenizer.eos().filter(|_| coded.iter().any(|(_, ended, _)| !ended)) else {
            return Ok((coded.into_iter().zip(renderings).map(|((c, ..), r)| (c, r.turns)).collect(), shortened));
        };
        shortened = 0;
        let mut out = Vec::with_capacity(turns.len());
        for i in turns {
            for rendering in self.template.render_with_answers(&messages[..=i], tools, i)? {
                let (mut coded, ended, less) = self.code(&rendering, messages)?;
                shortened += less;
                if !ended {
                    self.close(&mut coded, &rendering, messages[i].content.as_deref().unwrap_or_default(), eos)?;
                }
                out.push((coded, i..i + 1));
            }
        }
        Ok((out, shortened))
    }

    /// Ends a rendering behind its answer. Spaces that the template prints there are not the model's.
    fn close(&self, coded: &mut Coded, rendering: &Rendering, content: &str, eos: u32) -> Result<()> {
        let tokens = self.tokenizer.encode_with_offsets(&rendering.text, &rendering.plain)?;
        let Some(answer) = rendering.answers.last() else { return Ok(()) };
        let said = &rendering.text[answer.clone()];
        let words = [content, content.trim()].into_iter().find_map(|words| Some(said.rfind(words)? + words.len()));
        let over = answer.start + words.unwrap_or(said.len());
        let mut end = coded.trained.iter().rposition(|&t| t).map_or(0, |i| i + 1);
        let blank = |t: &(u32, Range<usize>)| t.1.start >= over && rendering.text[t.1.clone()].trim().is_empty();
        while end > 1 && coded.trained[end - 1] && blank(&tokens[end - 1]) {
            end -= 1;
        }
        coded.ids.truncate(end);
        coded.trained.truncate(end);
        coded.ids.push(eos);
        coded.trained.push(true);
        Ok(())
    }

    /// Tokens of a rendered conversation, whether generation would stop at the end of each answer, and how many answers
    /// are printed in part. Answers are learned up to and including the token that ends them.
    fn code(&self, rendering: &Rendering, messages: &[Message]) -> Result<(Coded, bool, usize)> {
        let tokens = self.tokenizer.encode_with_offsets(&rendering.text, &rendering.plain)?;
        let mut coded = Coded::new(&tokens, &rendering.answers, 1);
        coded.asked = Asked::find(&tokens, &rendering.text, messages);
        let stops = |i: usize| self.tokenizer.stop.contains(&tokens[i].0);
        let (mut all_ended, mut said) = (true, Vec::with_capacity(rendering.answers.len()));
        for answer in &rendering.answers {
            let first = tokens.partition_point(|t| t.1.end <= answer.start && t.1.start < answer.start);
            let last = first + tokens[first..].partition_point(|t| t.1.start < answer.end);
            let (mut ended, mut words) = (false, 0);
            for i in first..last {
                // What a template prints after the end of a turn is its own, not the model's. Where the template's author
                // marked the answers, these are what was marked.
                coded.trained[i] &= !ended || rendering.marked;
                ended |= stops(i);
                words += usize::from(coded.trained[i] && !stops(i));
            }
            // An author may have marked the words without their end, which would never be learned then.
            if !ended && rendering.marked && last < tokens.len() && last > first && stops(last) {
                coded.trained[last] = true;
                ended = true;
            }
            all_ended &= ended;
            said.push(words);
        }
        let shortened = self.all_said(rendering, messages, &said)?;
        Ok((coded, all_ended, shortened))
    }

    fn check(&mut self, coded: &Coded) {
        self.checks.begin(&coded.ids, self.tokenizer);
        self.checks.end(coded.ids.iter().zip(&coded.trained).filter(|(_, t)| **t).map(|(id, _)| *id), self.tokenizer);
    }

    /// Refuses a conversation of which the template leaves out what the model needs: a system's turn, tools, a call. Other
    /// keys that it leaves out are noted. The template is asked once for each name, for it prints by their names.
    fn all_printed(&mut self, messages: &[Message], tools: Option<&Value>) -> Result<()> {
        let known = |name: &str| self.printed.contains(name) || self.checks.left_out.contains(name);
        for (name, printed) in self.template.left_out(messages, tools, &known)? {
            let key = name.rsplit('.').next().unwrap_or(&name);
            if printed {
                self.printed.insert(name);
            } else if !name.contains('.') || matches!(key, "tool_calls" | "function_call") {
                let message = format!(
                    "expected a chat template that prints `{key}`, got one that leaves it out without a word; take it out \
                     of the data, or give the model a template that knows it"
                );
                return Err(data_error(key, message));
            } else {
                self.checks.left_out.insert(name);
            }
        }
        Ok(())
    }

    /// Refuses a template that prints nothing of an answer, and counts the answers of which it prints a part. `said` has
    /// the learned tokens of each answer without its end.
    fn all_said(&self, rendering: &Rendering, messages: &[Message], said: &[usize]) -> Result<usize> {
        let turns = rendering.turns.clone().filter(|&i| messages[i].role == "assistant" && messages[i].learned);
        let turns: Vec<usize> = turns.collect();
        if turns.len() != said.len() {
            return Ok(0); // blocks of the template's author are not always turns
        }
        // Templates trim, and lay out anew what they print.
        let words = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        let mut shortened = 0;
        for ((i, &said), answer) in turns.into_iter().zip(said).zip(&rendering.answers) {
            let content = words(messages[i].content.as_deref().unwrap_or_default());
            if said == 0 && !content.is_empty() {
                let message = format!(
                    "expected tokens to learn in turn {}, got none: the chat template prints nothing of the answer; \
                     correct the template or leave the turn out",
                    i + 1
                );
                return Err(data_error("sample", message));
            }
            shortened += usize::from(!words(&rendering.text[answer.clone()]).contains(&content));
        }
        Ok(shortened)
    }

    /// Plain text, learned from byte `start` on, with one beginning and one end: what the text has of them already is
    /// not added again.
    fn text(&mut self, text: &str, start: usize, out: &mut Vec<Sample>) -> Result<()> {
        if start == 0 && text.len() > split::PIECE {
            return self.long_text(text, out);
        }
        let mut tokens = self.tokenizer.encode_with_offsets(text, &self.tokenizer.plain_in(text))?;
        if !starts_with(&tokens, &self.prefix) {
            tokens.splice(0..0, self.prefix.iter().map(|&id| (id, 0..0)));
        }
        let end = self.end(text, &mut tokens);
        if start == 0 && tokens.len() > self.limit {
            return self.long_text(text, out);
        }
        let learned = start..text.len() + 1;
        let mut coded = Coded::new(&tokens, std::slice::from_ref(&learned), self.prefix.len());
        coded.trained[end..].fill(false);
        let learned = coded.ids.iter().zip(&coded.trained).filter(|(_, trained)| **trained);
        if learned.filter(|(id, _)| !self.tokenizer.stop.contains(id)).count() == 0 {
            return Err(nothing_learned());
        }
        // Nothing comes before the first token that could make it likely.
        if start > 0 && tokens[0].1.end > start && !tokens[0].1.is_empty() {
            let message = "expected a token before the completion, got one that the prompt and the completion share at the \
                           text's beginning, which cannot be learned; put more text into the prompt, such as a space at \
                           its end";
            return Err(data_error("prompt", message));
        }
        self.checks.texts += 1;
        self.check(&coded);
        let before = out.len();
        if coded.ids.len() > self.limit {
            self.splits.samples += 1;
            self.push_windows(coded, out);
            self.splits.parts += out.len() - before;
        } else {
            self.push(coded, out);
        }
        Ok(())
    }

    /// Closes the tokens of `text` with the end-of-text token, unless they end with a token at which generation stops.
    /// Returns how many tokens there are up to and including that; only spaces may follow it.
    fn end(&self, text: &str, tokens: &mut Vec<(u32, Range<usize>)>) -> usize {
        let blank = |t: &(u32, Range<usize>)| text.get(t.1.clone()).is_some_and(|t| t.trim().is_empty());
        let stops = |t: &(u32, Range<usize>)| self.tokenizer.stop.contains(&t.0);
        let last = tokens.iter().rposition(|t| stops(t) || !blank(t));
        match (last, self.tokenizer.eos()) {
            // Of several ends the first is the one at which generation stops.
            (Some(last), _) if stops(&tokens[last]) => {
                let before = tokens[..last].iter().rposition(|t| !stops(t) && !blank(t)).map_or(0, |i| i + 1);
                (before..=last).find(|&i| stops(&tokens[i])).unwrap_or(last) + 1
            }
            (_, eos) => {
                tokens.extend(eos.map(|eos| (eos, text.len()..text.len() + 1)));
                tokens.len()
            }
        }
    }

    /// A text of many windows. Each begins with what the tokenizer puts before a text or, where that is nothing, with
    /// the last token of the window before it, so that every token but the text's first is learned once.
    fn long_text(&mut self, text: &str, out: &mut Vec<Sample>) -> Result<()> {
        let (before, room) = (out.len(), self.limit - self.prefix.len().max(1));
        let mut context = self.prefix.clone();
        let mut pieces = split::pieces(text).peekable();
        let mut first = true;
        while let Some(piece) = pieces.next() {
            let mut tokens = self.tokenizer.encode_with_offsets(piece, &self.tokenizer.plain_in(piece))?;
            if std::mem::take(&mut first) && starts_with(&tokens, &self.prefix) {
                tokens.drain(..self.prefix.len());
            }
            if pieces.peek().is_none() {
                let end = self.end(piece, &mut tokens);
                tokens.truncate(end);
            }
            for window in split::text_windows(piece, &tokens, room) {
                let given = context.len().max(1);
                let ids: Vec<u32> = context.iter().copied().chain(tokens[window].iter().map(|t| t.0)).collect();
                if self.prefix.is_empty() {
                    context = ids.last().copied().into_iter().collect();
                }
                let trained = (0..ids.len()).map(|i| i >= given).collect();
                self.push(Coded { ids, trained, asked: Asked::default() }, out);
            }
        }
        if let (Some(first), Some(last)) = (out.get(before), out.last()) {
            self.checks.texts += 1;
            self.checks.begin(&first.ids, self.tokenizer);
            self.checks.end(last.trained.iter().map(|i| last.ids[i]), self.tokenizer);
        }
        self.splits.samples += 1;
        self.splits.parts += out.len() - before;
        Ok(())
    }

    fn push_windows(&mut self, coded: Coded, out: &mut Vec<Sample>) {
        if coded.ids.len() <= self.limit {
            return self.push(coded, out);
        }
        let starts_with_prefix = !self.prefix.is_empty() && coded.ids.starts_with(&self.prefix);
        let keep = if starts_with_prefix { self.prefix.len() } else { 0 };
        let (windows, left_out) = split::masked_windows(&coded, self.limit, keep);
        self.splits.left_out_tokens += left_out;
        for window in windows {
            self.push(window, out);
        }
    }

    /// Keeps what has something to learn.
    fn push(&mut self, coded: Coded, out: &mut Vec<Sample>) {
        if coded.learned() > 0 {
            let mut ids = coded.ids;
            ids.shrink_to_fit();
            out.push(Sample { ids, trained: coded.trained.into_iter().collect(), asked: coded.asked });
        }
    }
}

fn starts_with(tokens: &[(u32, Range<usize>)], prefix: &[u32]) -> bool {
    tokens.len() >= prefix.len() && tokens.iter().zip(prefix).all(|(t, id)| t.0 == *id)
}

/// Where exchanges begin: at the first turn after the system's, and at each user's turn after an answer.
fn exchanges(messages: &[Message], head: usize) -> Vec<usize> {
    let mut starts = vec![head];
    let mut answered = false;
    for (i, message) in messages.iter().enumerate().skip(head) {
        if message.role == "user" && answered {
            starts.push(i);
            answered = false;
        }
        answered |= message.role == "assistant";
    }
    starts
}

/// The layout of the Stanford Alpaca data for an instruction with an input. Without one, the chat template that stands in for
/// a missing one writes the same layout.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
         Input:\n{input}\n\n### Response:\n"
    )
}

fn nothing_learned() -> Error {
    data_error("sample", "expected at least one token to learn, got none; give it an answer")
}
