//! Adapters that a chat picks by what it is asked, see `src/engine/router.rs`.

use super::Chat;
use crate::chat::Message;
use crate::engine::adapters::AdapterSet;
use crate::engine::router::{Choice, Pick};
use crate::error::Result;
use std::sync::Arc;

impl Chat {
    /// The adapters that were picked for the last request, the nearest first; none without [`Engine::route`](crate::Engine::route).
    #[must_use]
    pub fn picked(&self) -> &[Pick] {
        self.routed.as_ref().map_or(&[], |choice| &choice.picks)
    }

    /// Picks the adapters for an answer to `messages`, as the answer will. Returns whether they are others than before.
    ///
    /// # Errors
    /// The model has no tokenizer; out of memory.
    pub fn pick(&mut self, messages: &[Message]) -> Result<bool> {
        if self.engine.router().is_none() {
            return Ok(false);
        }
        let said = self.engine.said(messages)?;
        self.pick_for(&said)
    }

    /// Picks the adapters for a request of these texts, where they are chosen so.
    pub(super) fn pick_for(&mut self, texts: &[Vec<u32>]) -> Result<bool> {
        let router = self.engine.router().filter(|_| self.chosen.is_none());
        let Some(router) = router else {
            self.routed = None;
            return Ok(false);
        };
        let picks = self.engine.picked(&router, texts)?;
        let mix = |picks: &[Pick]| picks.iter().map(|pick| (pick.name.clone(), pick.weight)).collect::<Vec<_>>();
        if let Some(choice) = self.routed.as_mut().filter(|choice| Arc::ptr_eq(&choice.router, &router))
            && mix(&choice.picks) == mix(&picks)
        {
            choice.picks = picks;
            return Ok(false);
        }
        let set = router.set(&picks)?;
        self.routed = Some(Choice { router, picks, set });
        Ok(true)
    }

    /// Picks those adapters that a kept chat was read with, where they are chosen by request and here.
    pub(super) fn pick_kept(&mut self, identities: &[(u64, f32)]) -> Result<()> {
        let router = self.engine.router().filter(|_| self.chosen.is_none());
        if let Some(router) = router
            && let Some((picks, set)) = router.set_with(identities)?
        {
            self.routed = Some(Choice { router, picks, set });
        }
        Ok(())
    }

    /// The adapters that were picked last, where they are chosen so.
    pub(super) fn routed_set(&self) -> Option<Arc<AdapterSet>> {
        let router = self.engine.router().filter(|_| self.chosen.is_none())?;
        let choice = self.routed.as_ref().filter(|choice| Arc::ptr_eq(&choice.router, &router))?;
        Some(Arc::clone(&choice.set))
    }
}
