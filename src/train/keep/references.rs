//! What the base says on the held prompts: its answers, and its likeliest tokens at each of their places.
//!
//! They are stored in the output folder while a run is unfinished, so that one that is resumed need not ask again. Shares of
//! a distribution rest in 16 bits, as multiples of `1 / 65535`.

use crate::error::{Error, Result};
use crate::rng::mix;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// Names in the output folder: what the base says, and what the adapter says that the run starts from.
pub(super) const GENERAL: &str = "keep.safetensors";
pub(super) const TAUGHT: &str = "keep-taught.safetensors";
/// Tokens of a distribution that are told apart; the others count as one.
pub(crate) const TOP: usize = 16;
const ONE: f32 = 65535.0;

/// Texts of prompt and answer, and the distribution of the next token at their last places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct References {
    /// Of each text where its tokens and its places end among all.
    ends: Vec<[u32; 2]>,
    tokens: Vec<u32>,
    /// `[places, TOP]`, the likeliest first.
    ids: Vec<u32>,
    shares: Vec<u16>,
}

/// A text and the distributions that belong to its last places: as many as `shares` has for `TOP` each.
pub(super) struct Reference<'a> {
    pub tokens: &'a [u32],
    pub ids: &'a [u32],
    pub shares: &'a [u16],
}

/// Distributions as they are made, those of one text.
#[derive(Clone, Debug, Default)]
pub(super) struct Tops {
    ids: Vec<u32>,
    shares: Vec<u16>,
}

impl Tops {
    /// Adds the likeliest tokens under the softmax of `logits`, which are finite.
    pub fn push(&mut self, logits: &[f32]) {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if order.len() > TOP {
            order.select_nth_unstable_by(TOP - 1, by_logit);
            order.truncate(TOP);
        }
        order.sort_unstable_by(by_logit);
        let max = order.first().map_or(0.0, |id| logits[*id as usize]);
        let e = |l: f32| f64::from(l - max).exp();
        let sum: f64 = logits.iter().map(|l| e(*l)).sum();
        for at in 0..TOP {
            // Of a vocabulary that is smaller the last ones have no share.
            let id = order.get(at).copied();
            let share = id.map_or(0.0, |id| e(logits[id as usize]) / sum);
            self.ids.push(id.unwrap_or_default());
            self.shares.push((share * f64::from(ONE)).floor() as u16);
        }
    }
}

/// The share that a number stands for.
pub(super) fn share(stored: u16) -> f32 {
    f32::from(stored) / ONE
}

impl References {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds a text with the distributions of its last places.
    pub fn push(&mut self, tokens: &[u32], tops: Tops) {
        self.tokens.extend_from_slice(tokens);
        self.ids.extend(tops.ids);
        self.shares.extend(tops.shares);
        self.ends.push([self.tokens.len(), self.ids.len() / TOP].map(|n| n as u32));
    }

    pub fn get(&self, i: usize) -> Reference<'_> {
        let [first, place] = if i == 0 { [0, 0] } else { self.ends[i - 1].map(|n| n as usize) };
        let [end, last] = self.ends[i].map(|n| n as usize);
        let places = place * TOP..last * TOP;
        Reference { tokens: &self.tokens[first..end], ids: &self.ids[places.clone()], shares: &self.shares[places] }
    }

    /// Bytes of so many texts with prompts of `tokens` tokens in all and answers as long as they may be.
    pub fn most_bytes(texts: usize, tokens: usize, answer: usize) -> u64 {
        (size_of::<[u32; 2]>() * texts + 4 * (tokens + texts * answer) + 6 * TOP * texts * answer) as u64
    }

    /// Writes them under the number of what they were made from.
    pub fn save(&self, path: &Path, made_from: u64) -> Result<()> {
        let words = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let parts = [
            ("made_from", Dtype::U64, vec![1], made_from.to_le_bytes().to_vec()),
            ("ends", Dtype::U32, vec![self.ends.len(), 2], words(self.ends.as_flattened())),
            ("tokens", Dtype::U32, vec![self.tokens.len()], words(&self.tokens)),
            ("ids", Dtype::U32, vec![self.ids.len() / TOP, TOP], words(&self.ids)),
            (
                "shares",
                Dtype::U16,
                vec![self.shares.len() / TOP, TOP],
                self.shares.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
        ];
        let views = parts.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("shapes follow from the data"))
        });
        let bytes = safetensors::serialize(views, None).map_err(|e| Error::format(path, "file", "tensors", e))?;
        crate::format::write_bytes(path, &bytes)
    }

    /// Those in the file, if they were made from the same and are whole.
    pub fn load(path: &Path, made_from: u64) -> Option<Self> {
        let bytes = std::fs::read(path).ok()?;
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let data = |name: &str| file.tensor(name).ok().map(|t| t.data().to_vec());
        let words = |name: &str| {
            let data = data(name)?;
            Some(data.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect::<Vec<u32>>())
        };
        if data("made_from")? != made_from.to_le_bytes() {
            return None;
        }
        let ends: Vec<[u32; 2]> = words("ends")?.as_chunks().0.to_vec();
        let shares = data("shares")?.as_chunks().0.iter().map(|half| u16::from_le_bytes(*half)).collect();
        let found = Self { ends, tokens: words("tokens")?, ids: words("ids")?, shares };
        let rising = found.ends.is_sorted_by(|a, b| a[0] < b[0] && a[1] < b[1]);
        let last = found
            .ends
            .last()
            .is_some_and(|end| end[0] as usize == found.tokens.len() && end[1] as usize * TOP == found.ids.len());
        (rising && last && found.ids.len() == found.shares.len()).then_some(found)
    }

    /// Removes the files of a run that is over from its folder.
    pub fn remove(dir: &Path) -> Result<()> {
        [GENERAL, TAUGHT].map(|name| dir.join(name)).iter().try_for_each(|path| match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
            _ => Ok(()),
        })
    }
}

/// A number that changes when any of the prompts does.
pub(super) fn fingerprint(prompts: &[Vec<u32>], key: u64) -> u64 {
    prompts
        .iter()
        .fold(key, |hash, ids| ids.iter().fold(mix(hash, ids.len() as u64), |hash, id| mix(hash, u64::from(*id))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> References {
        let mut out = References::default();
        for text in 0..3u32 {
            let mut tops = Tops::default();
            for place in 0..=text {
                let logits: Vec<f32> = (0..40).map(|v| ((v * 7 + place) % 13) as f32 / 3.0).collect();
                tops.push(&logits);
            }
            out.push(&[text, 5, 6, 7], tops);
        }
        out
    }

    #[test]
    fn the_likeliest_are_kept_and_never_sum_to_more_than_one() {
        let made = made();
        let first = made.get(0);
        assert_eq!((first.tokens, first.ids.len()), (&[0, 5, 6, 7][..], TOP));
        // Of 40 logits `(7 v) % 13 / 3` the largest are those of 12: v = 11, 24, 37.
        assert_eq!(first.ids[..3], [11, 24, 37]);
        let sum: f32 = first.shares.iter().map(|s| share(*s)).sum();
        assert!(sum < 1.0 && first.shares.is_sorted_by(|a, b| a >= b), "{sum}");
        let mut few = Tops::default();
        few.push(&[0.0, 40.0]);
        assert_eq!((few.ids[0], share(few.shares[0]), few.ids.len()), (1, 1.0, TOP));
    }

    #[test]
    fn what_was_stored_comes_back_for_the_same_prompts_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, path, made) = (dir.path(), &dir.path().join(GENERAL), made());
        assert_eq!(References::load(path, 7), None);
        made.save(path, 7).unwrap();
        assert_eq!(References::load(path, 7), Some(made.clone()));
        assert_eq!(References::load(path, 8), None, "made from something else");
        let whole = std::fs::read(path).unwrap();
        for cut in [0, 8, whole.len() / 2, whole.len() - 1] {
            std::fs::write(path, &whole[..cut]).unwrap();
            assert_eq!(References::load(path, 7), None, "cut to {cut} bytes");
        }
        References::remove(dir).and_then(|()| References::remove(dir)).unwrap();
        let prompts = [vec![1, 2], vec![3]];
        assert_ne!(fingerprint(&prompts, 1), fingerprint(&[vec![1], vec![2, 3]], 1));
    }
}
