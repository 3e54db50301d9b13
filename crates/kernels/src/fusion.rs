//! How Burn looks for operations on GPUs that it can fuse into one kernel.

/// What Burn fuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fusion {
    /// Operations that follow one another. The passes here are written for it.
    ///
    /// Burn's own setting follows up to five independent chains at a time. In a decoder layer there are more, and what
    /// is fused then depends on which come first: a layer of Llama 3.1 8B took more launches and twice the memory
    /// traffic the more chains were followed (1 to 20 were tried).
    InOrder,
    /// Nothing, for drivers that compute fused kernels wrong.
    Off,
}

/// Sets what Burn fuses in this process. To be called before a GPU is used; whether it was in time.
///
/// Burn's environment variables still count; a `burn.toml` in the current folder does not.
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

/// As above; without a GPU backend there is nothing to set.
#[cfg(not(feature = "cube"))]
pub fn set_fusion(_fusion: Fusion) -> bool {
    false
}

#[cfg(all(test, feature = "cube"))]
mod tests {
    use super::*;

    #[test]
    fn burn_understands_the_settings() {
        let search = |fusion| settings(fusion).unwrap().fusion().beam_search.clone();
        assert_eq!(search(Fusion::InOrder).max_blocks, 1);
        assert_eq!(search(Fusion::InOrder).max_explorations, None);
        assert_eq!(search(Fusion::Off).max_explorations, Some(0));
    }
}
