//! What is longer than a sample may be: where it is cut, and a count of it.

use super::{Asked, Mask};
use serde::Serialize;
use std::ops::{AddAssign, Range};

/// Text that is tokenized at once, in bytes; more is cut between paragraphs first, for tokens with their places take
/// some two hundred times the memory of the text while the tokenizer is at work.
pub(super) const PIECE: usize = 1 << 17;

/// What was too long for one sample, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Splits {
    /// Conversations and texts that were split.
    pub samples: usize,
    /// Samples that they became.
    pub parts: usize,
    /// Tokens that are only read and found no room before what is learned.
    pub left_out_tokens: usize,
    /// Turns that are only read and found no room, or come after the last answer.
    pub left_out_turns: usize,
    /// Parts that had no room for the system's turns and the tools.
    pub without_system: usize,
}

impl AddAssign for Splits {
    fn add_assign(&mut self, other: Self) {
        self.samples += other.samples;
        self.parts += other.parts;
        self.left_out_tokens += other.left_out_tokens;
        self.left_out_turns += other.left_out_turns;
        self.without_system += other.without_system;
    }
}

/// A record that was split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitRecord {
    /// The samples that it became.
    pub samples: Range<usize>,
    /// What became of the rest.
    pub splits: Splits,
}

/// Tokens with a flag each: is it learned?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Coded {
    pub ids: Vec<u32>,
    pub trained: Vec<bool>,
    /// Tokens of what is asked, where that is told apart.
    pub asked: Asked,
}

impl Coded {
    /// Marks the tokens after the first `given` that have a character of `learned`, whose ranges rise. So a token that
    /// begins in what was given and ends in an answer is learned: without it the answer would lack its beginning. A token
    /// of no character belongs to what follows it.
    pub fn new(tokens: &[(u32, Range<usize>)], learned: &[Range<usize>], given: usize) -> Self {
        let touches = |t: &Range<usize>| {
            // The first range that is not over where the token begins.
            let next = learned.partition_point(|l| l.end <= t.start);
            learned.get(next).is_some_and(|l| if t.is_empty() { l.start <= t.start } else { l.start < t.end })
        };
        let trained = tokens.iter().enumerate().map(|(i, (_, range))| i >= given.max(1) && touches(range)).collect();
        Self { ids: tokens.iter().map(|t| t.0).collect(), trained, asked: Asked::default() }
    }

    pub fn learned(&self) -> usize {
        self.trained.iter().filter(|&&t| t).count()
    }
}

/// Windows of at most `limit` tokens in which every learned token is learned once. A window has as much before what it
/// learns as fits, at least half of it where more is to come, and always the first `keep` tokens. Also returns how many
/// tokens before the last learned one are in no window.
pub(super) fn masked_windows(coded: &Coded, limit: usize, keep: usize) -> (Vec<Coded>, usize) {
    let room = limit - keep;
    let mask: Mask = coded.trained.iter().copied().collect();
    let end = mask.iter().last().map_or(0, |last| last + 1);
    let (mut windows, mut next, mut seen, mut left_out) = (Vec::new(), mask.iter().next(), keep, 0);
    while let Some(first) = next {
        // Half the room for what is read, unless the rest needs less or there is not so much before it.
        let stop = end.min(first + (room - room / 2).max(room.saturating_sub(first.saturating_sub(keep))));
        let start = keep.max(stop.saturating_sub(room)).min(first);
        let ids = coded.ids[..keep].iter().chain(&coded.ids[start..stop]).copied().collect();
        let learned = (start..stop).map(|i| i >= first && coded.trained[i]);
        let trained: Vec<bool> = std::iter::repeat_n(false, keep).chain(learned).collect();
        windows.push(Coded { ids, trained, asked: Asked::default() });
        left_out += start.saturating_sub(seen);
        seen = stop;
        next = (stop..end).find(|&i| coded.trained[i]);
    }
    (windows, left_out)
}

/// Windows of at most `room` tokens that make up all of `tokens`, cut where the text has its best border in the second
/// half of each: between paragraphs, lines, sentences or words.
pub(super) fn text_windows(text: &str, tokens: &[(u32, Range<usize>)], room: usize) -> Vec<Range<usize>> {
    let (mut windows, mut start) = (Vec::new(), 0);
    while tokens.len() - start > room {
        let candidates = start + room.div_ceil(2)..=start + room;
        // The last of the best.
        let cut = candidates.max_by_key(|&i| border(text, &tokens[i - 1].1, &tokens[i].1)).expect("there are some");
        windows.push(start..cut);
        start = cut;
    }
    windows.push(start..tokens.len());
    windows
}

/// How good a place between two tokens is to cut a text.
fn border(text: &str, before: &Range<usize>, after: &Range<usize>) -> u8 {
    let (Some(left), Some(right)) = (text.get(..after.start), text.get(after.start..)) else { return 0 };
    if before.end > after.start {
        return 0; // two tokens of one character
    }
    let space = right.starts_with(char::is_whitespace);
    let sentence = left.trim_end_matches(' ').ends_with(['.', '!', '?', '\u{3002}', '\u{2026}']);
    match () {
        () if left.ends_with("\n\n") || left.ends_with("\n\r\n") => 5,
        () if left.ends_with('\n') => 4,
        () if sentence && (space || left.ends_with(' ')) || left.ends_with('\u{3002}') => 3,
        () if space || left.ends_with(char::is_whitespace) => 2,
        () => 1,
    }
}

/// A long text in pieces of at most [`PIECE`] bytes that end with a paragraph, line or word where possible.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let room = &rest[..rest.floor_char_boundary(PIECE)];
        let border = || room.rfind("\n\n").map(|i| i + 2).or(room.rfind('\n').map(|i| i + 1)).or(room.rfind(' '));
        let cut = if room.len() == rest.len() { None } else { border().filter(|&i| i > 0) };
        let (piece, after) = rest.split_at(cut.unwrap_or(room.len()));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded(mask: &str) -> Coded {
        let trained = mask.chars().map(|c| c == 'x').collect();
        Coded { ids: (0..mask.len() as u32).collect(), trained, asked: Asked::default() }
    }

    #[test]
    fn every_learned_token_is_learned_once_with_what_fits_before_it() {
        for mask in [
            ".x",
            "...xxxxxxxxxxxxxxxx",
            "..................xx",
            "..xx..xxxx.......x......x..",
            ".xxxxx",
            "...xx.......",
        ] {
            for (limit, keep) in [(2, 0), (3, 0), (3, 1), (4, 1), (5, 0), (8, 1), (100, 0)] {
                let all = coded(mask);
                let (windows, left_out) = masked_windows(&all, limit, keep);
                let mut learned = vec![0; mask.len()];
                let mut seen = vec![false; mask.len()];
                for w in &windows {
                    assert!(w.ids.len() <= limit && w.learned() > 0, "{mask} {limit} {keep}: {w:?}");
                    assert!(!w.trained[0] && w.ids[..keep] == all.ids[..keep], "{mask} {limit} {keep}: {w:?}");
                    assert!(w.ids[keep..].windows(2).all(|p| p[1] == p[0] + 1), "{mask} {limit} {keep}: {w:?}");
                    for (&id, &t) in w.ids.iter().zip(&w.trained) {
                        learned[id as usize] += usize::from(t);
                        seen[id as usize] = true;
                    }
                }
                let once: Vec<usize> =
                    all.trained.iter().enumerate().map(|(i, &t)| usize::from(t && i >= keep)).collect();
                assert_eq!(learned, once, "{mask} {limit} {keep}");
                let end = mask.rfind('x').unwrap();
                assert_eq!(seen[..end].iter().filter(|s| !**s).count(), left_out, "{mask} {limit} {keep}");
            }
        }
    }

    #[test]
    fn texts_are_cut_at_their_best_borders_and_nothing_is_lost() {
        let text = "One two. Three four.\n\nFive six seven. Eight nine ten eleven twelve thirteen";
        let tokens: Vec<(u32, Range<usize>)> = (0..text.len()).map(|i| (i as u32, i..i + 1)).collect();
        let parts: Vec<&str> = text_windows(text, &tokens, 24).into_iter().map(|w| &text[w]).collect();
        assert_eq!(
            parts,
            ["One two. Three four.\n\n", "Five six seven. ", "Eight nine ten eleven ", "twelve thirteen"]
        );
        let long = "paragraph of words\n\n".repeat(1 << 17);
        let all: Vec<&str> = pieces(&long).collect();
        assert!(all.len() > 2 && all.iter().all(|p| p.len() <= PIECE && p.ends_with("\n\n")) && all.concat() == long);
        let solid = "\u{e9}".repeat(PIECE);
        assert_eq!(pieces(&solid).collect::<Vec<_>>().concat(), solid);
    }
}
