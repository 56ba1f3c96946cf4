//! Chooses the one TLS provider of the process, which rustls does not do by itself.

/// Makes aws-lc-rs what every TLS connection of this process uses, unless something was chosen before. Clients cannot be
/// built without; calling it again changes nothing.
pub fn choose_provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}
