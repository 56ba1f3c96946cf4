//! Counts what the spool may still take: bytes on disk, and bytes kept in memory on their way out.

use std::sync::atomic::{AtomicU64, Ordering};

/// A bound that many attempts share. What is taken is given back by whoever took it.
#[derive(Debug)]
pub struct Room {
    limit_bytes: u64,
    used_bytes: AtomicU64,
}

impl Room {
    pub fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, used_bytes: AtomicU64::new(0) }
    }

    /// Takes so many bytes, or nothing.
    pub fn try_take(&self, bytes: u64) -> bool {
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|used| *used <= self.limit_bytes)
            })
            .is_ok()
    }

    /// Takes so many bytes even past the limit: what is already on disk is there, whatever the limit says.
    pub fn take(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn give_back(&self, bytes: u64) {
        let before = self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "gave back {bytes} of {before} bytes");
    }

    pub fn free_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.used_bytes.load(Ordering::Relaxed))
    }

    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_up_to_the_limit_and_not_a_byte_more() {
        let room = Room::new(10);
        assert!(room.try_take(7));
        assert!(!room.try_take(4));
        assert!(room.try_take(3));
        assert_eq!(room.free_bytes(), 0);
        room.give_back(4);
        assert_eq!(room.free_bytes(), 4);
        room.take(100);
        assert_eq!(room.free_bytes(), 0);
        assert!(!room.try_take(u64::MAX));
    }
}
