//! What an adapter was taught before: the questions of its data, which lie beside it, so that a run that goes on from it can
//! hold it to its own answers.

use super::super::Dataset;
use crate::adapter::{AdapterFile, LESSONS as FILE};
use crate::error::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;

/// Questions that are kept at most, of all lessons together.
const MOST: usize = 256;
/// Longest file that is read, in bytes: more than so many questions of a few thousand tokens take.
const LONGEST: u64 = 16 << 20;

/// Questions, as tokens up to where their answers begin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::train) struct Lessons {
    pub questions: Vec<Vec<u32>>,
}

impl Lessons {
    /// Those of `data`: of each sample what comes before its first learned token, where something does. What is learned
    /// from its first word on, such as a note, asks nothing.
    pub fn of(data: &Dataset) -> Self {
        let asked = data.samples.iter().filter_map(|sample| {
            let first = sample.trained.iter().next()?;
            (first > 1).then(|| sample.ids[..first].to_vec())
        });
        Self { questions: asked.collect::<BTreeSet<_>>().into_iter().collect() }.bounded()
    }

    /// These and what came before them, as many of each as there is room for.
    pub fn after(self, before: &Self) -> Self {
        let mut seen: BTreeSet<Vec<u32>> = BTreeSet::new();
        let all = before.questions.iter().cloned().chain(self.questions);
        Self { questions: all.filter(|question| seen.insert(question.clone())).collect() }.bounded()
    }

    /// Spread over all of them where there are too many.
    fn bounded(mut self) -> Self {
        let count = self.questions.len();
        if count > MOST {
            self.questions = (0..MOST).map(|i| std::mem::take(&mut self.questions[i * count / MOST])).collect();
        }
        self
    }

    /// Those of the adapter in `dir`; none if it has no such file.
    ///
    /// # Errors
    /// The file is broken.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let bytes = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Ok(meta) if meta.len() > LONGEST => {
                return Err(broken(&path, &format!("at most {LONGEST} bytes"), &meta.len()));
            }
            found => found.and_then(|_| std::fs::read(&path)).map_err(|e| Error::io("read", &path, e))?,
        };
        Self::parse(&path, &bytes)
    }

    /// Those of the adapter `file`, wherever it lies.
    ///
    /// # Errors
    /// As [`Lessons::read`].
    pub fn of_adapter(file: &AdapterFile) -> Result<Self> {
        match (file.folder(), file.part(FILE)) {
            (Some(dir), _) => Self::read(dir),
            (None, Some(bytes)) => Self::parse(&file.dir.join(FILE), bytes),
            (None, None) => Ok(Self::default()),
        }
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|e| broken(path, "`questions`, lists of token ids", &e))
    }

    /// Writes them beside an adapter.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string(self).expect("plain data serializes");
        crate::format::write_bytes(&dir.join(FILE), text.as_bytes())
    }
}

fn broken(path: &Path, expected: &str, got: &dyn std::fmt::Display) -> Error {
    let message = format!("expected {expected}, got {got}; remove it, and what was taught before is not held");
    Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Sample;

    fn lessons(samples: &[(&[u32], usize)]) -> Lessons {
        let sample =
            |&(ids, first): &(&[u32], usize)| Sample::new(ids.to_vec(), (0..ids.len()).map(|i| i >= first).collect());
        Lessons::of(&Dataset::new("made", samples.iter().map(sample).collect()))
    }

    #[test]
    fn questions_are_kept_once_and_notes_have_none() {
        let first = lessons(&[(&[1, 2, 3, 4], 2), (&[1, 2, 9, 9], 2), (&[5, 6, 7], 1), (&[8, 8, 8, 7], 3)]);
        assert_eq!(first.questions, [vec![1, 2], vec![8, 8, 8]]);
        let both = lessons(&[(&[3, 3, 3], 2), (&[1, 2, 5], 2)]).after(&first);
        assert_eq!(both.questions, [vec![1, 2], vec![8, 8, 8], vec![3, 3]]);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Lessons::read(dir.path()).unwrap(), Lessons::default());
        both.write(dir.path()).unwrap();
        assert_eq!(Lessons::read(dir.path()).unwrap(), both);
        std::fs::write(dir.path().join(FILE), "{\"questions\": 3}").unwrap();
        assert_eq!(Lessons::read(dir.path()).unwrap_err().code(), ErrorCode::Format);
    }

    #[test]
    fn many_questions_are_spread_over_all_lessons() {
        let all = Lessons { questions: (0..1000).map(|i| vec![i, i]).collect() }.bounded();
        assert_eq!((all.questions.len(), all.questions[0][0]), (MOST, 0));
        assert!(all.questions[MOST - 1][0] > 990);
    }
}
