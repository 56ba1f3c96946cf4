//! Tells a test of every moment at which a crash would leave something else in the spool. Without the feature `testing` nobody is
//! told.

use std::path::Path;

/// Something of the spool in this folder has just been written, made, moved or removed, or is about to be.
#[cfg(not(feature = "testing"))]
pub fn reached(_path: &Path) {}

#[cfg(feature = "testing")]
pub use testing::*;

#[cfg(feature = "testing")]
mod testing {
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::Path;

    type Listener = Arc<dyn Fn() + Send + Sync>;

    static LISTENERS: Mutex<Vec<(PathBuf, Listener)>> = Mutex::new(Vec::new());

    pub fn reached(path: &Path) {
        let listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        let concerned = listeners.iter().filter(|(folder, _)| path.starts_with(folder));
        let concerned: Vec<Listener> = concerned.map(|(_, listener)| listener.clone()).collect();
        drop(listeners);
        concerned.iter().for_each(|listener| listener());
    }

    /// Someone is told for as long as this is there.
    #[must_use = "dropped, nobody is told"]
    pub struct Told(PathBuf);

    /// Tells of every write below a folder, before and after it.
    pub fn tell_of_writes(folder: &Path, listener: impl Fn() + Send + Sync + 'static) -> Told {
        let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.push((folder.to_owned(), Arc::new(listener)));
        Told(folder.to_owned())
    }

    impl Drop for Told {
        fn drop(&mut self) {
            let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
            listeners.retain(|(folder, _)| *folder != self.0);
        }
    }
}
