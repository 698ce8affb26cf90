//! zstd: frames one after the other, each with its checksum.

use super::stream::Reader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, Read};

/// Unpacks all frames.
pub(super) struct Zstd {
    source: Ahead,
    decoder: FrameDecoder,
    /// Within a frame.
    open: bool,
}

/// A reader whose next byte may have been looked at.
struct Ahead {
    byte: Option<u8>,
    inner: Reader,
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match (self.byte, buf.first_mut()) {
            (Some(byte), Some(first)) => {
                (*first, self.byte) = (byte, None);
                Ok(1)
            }
            _ => self.inner.read(buf),
        }
    }
}

impl Zstd {
    pub fn new(inner: Reader) -> Self {
        Self { source: Ahead { byte: None, inner }, decoder: FrameDecoder::new(), open: false }
    }

    /// Goes to the next frame with data; false at the end.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            let mut first = [0];
            if self.source.read(&mut first)? == 0 {
                return Ok(false);
            }
            self.source.byte = Some(first[0]);
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                }
                Err(e) => return Err(broken(e)),
            }
        }
    }
}

impl Read for Zstd {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !buf.is_empty() {
            if !self.open && !self.next_frame()? {
                return Ok(0);
            }
            self.open = true;
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1)).map_err(broken)?;
            }
            let n = self.decoder.read(buf)?;
            if n > 0 {
                return Ok(n);
            }
            let (told, found) = (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum());
            if told.is_some() && told != found {
                return Err(broken("the checksum of zstd is another"));
            }
            self.open = false;
        }
        Ok(0)
    }
}

fn broken(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}
