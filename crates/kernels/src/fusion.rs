//! How Burn searches for operations on GPUs that it can fuse into one kernel.

/// What Burn fuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fusion {
    /// Consecutive operations. The manual passes order their operations for this setting.
    ///
    /// Burn's default follows up to five independent chains of operations at a time. A decoder layer has more, and then
    /// their order decides what is fused: with more chains (1 to 20 were tried) a layer of Llama 3.1 8B took more
    /// launches and up to twice the memory traffic.
    InOrder,
    /// Nothing, for drivers with errors in fused kernels.
    Off,
}

/// Sets what Burn fuses in this process. Must be called before a GPU is used; returns whether it was.
///
/// Burn's environment variables still apply; a `burn.toml` in the current folder does not.
#[cfg(feature = "cube")]
pub fn set_fusion(fusion: Fusion) -> bool {
    use burn_cubecl::cubecl::config::RuntimeConfig;

    match settings(fusion) {
        Ok(config) => burn::BurnConfig::try_set(config.override_from_env()),
        Err(_) => false,
    }
}

#[cfg(feature = "cube")]
fn settings(fusion: Fusion) -> serde_json::Result<burn::BurnConfig> {
    serde_json::from_str(match fusion {
        Fusion::InOrder => r#"{"fusion": {"beam_search": {"max_blocks": 1}}}"#,
        Fusion::Off => r#"{"fusion": {"beam_search": {"max_explorations": 0}}}"#,
    })
}

/// Without a GPU backend there is nothing to set.
#[cfg(not(feature = "cube"))]
pub fn set_fusion(_fusion: Fusion) -> bool {
    false
}

#[cfg(all(test, feature = "cube"))]
mod tests {
    use super::*;

    #[test]
    fn burn_parses_the_settings() {
        let search = |fusion| settings(fusion).unwrap().fusion().beam_search.clone();
        assert_eq!(search(Fusion::InOrder).max_blocks, 1);
        assert_eq!(search(Fusion::InOrder).max_explorations, None);
        assert_eq!(search(Fusion::Off).max_explorations, Some(0));
    }
}
