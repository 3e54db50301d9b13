//! A training run: what a configuration asks for is read, planned, trained, shown, and kept whatever happens.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`train`] | the loop |
//! | [`session`], [`step`] | its parts |
//! | [`plan`], [`fit`] | parameters and memory from shapes alone; what fits the device |
//! | [`checkpoint`], [`interrupt`], [`guard`] | what keeps a run's work, whatever happens |
//! | [`screen`], [`metrics`], [`output`], [`model_card`] | what a run shows and writes |
//! | [`continued`] | a run that starts from an adapter |

pub mod checkpoint;
pub mod continued;
pub mod fit;
pub mod guard;
pub mod interrupt;
pub mod metrics;
pub mod model_card;
pub mod output;
pub mod plan;
pub mod screen;
pub mod session;
pub mod step;
pub mod train;
