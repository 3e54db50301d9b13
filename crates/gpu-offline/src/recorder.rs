//! A device of CubeCL that runs nothing and keeps the kernels that are launched on it.
//!
//! Our launches choose tiles, vector widths and types from tensors and from the device's properties. Recording what
//! they launch compiles what users compile, without a second list of these choices.

use std::sync::{Arc, Mutex, PoisonError};

use cubecl::prelude::CubeCount;
use cubecl::server::{
    BufferBinding, CopyDescriptor, KernelArguments, ProfileError, ProfilingToken, Server,
    ServerCommunication, ServerError, ServerStorage, ServerUtilities,
};
use cubecl::{CubeKernel, StreamMemoryReport};
use cubecl_common::bytes::Bytes;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_common::profile::ProfileDuration;
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::future::DynFut;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::PitchedMemoryLayoutPolicy;
use cubecl_server::client::Client;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{ManagedMemoryHandle, MemoryAllocationMode};
use cubecl_server::storage::{BytesResource, BytesStorage, ManagedResource};

use crate::targets::Target;

/// A launched kernel.
pub type Kernel = Box<dyn CubeKernel>;

/// What was launched since [`recorded`] began.
static LAUNCHED: Mutex<Vec<Kernel>> = Mutex::new(Vec::new());

/// The device.
#[derive(Debug)]
struct Recorder {
    utilities: Arc<ServerUtilities>,
}

/// The client of a device with the properties of this target.
pub fn client(target: Target) -> Client {
    Client::load::<Recorder>(DeviceId::new(0, target.index()))
}

/// The kernels that this function launches on `client`, in order.
pub fn recorded(client: &Client, launches: impl FnOnce()) -> Vec<Kernel> {
    let launched = || std::mem::take(&mut *LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner));
    launched();
    launches();
    // The device's thread handles calls in order, and this one waits for its answer.
    if let Err(error) = client.flush() {
        unreachable!("nothing here can fail: {error:?}");
    }
    launched()
}

/// The answer to calls that need memory.
fn no_memory() -> ServerError {
    ServerError::Generic {
        reason: "this device has no memory: it only records launches".into(),
        backtrace: BackTrace::capture(),
    }
}

impl DeviceService for Recorder {
    fn init(device: DeviceId) -> Self {
        let target = Target::of_index(device.index_id);
        // As CubeCL's CUDA runtime aligns rows.
        let policy = PitchedMemoryLayoutPolicy::new(512);
        let (utilities, _captures) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            "recorder",
            target.device_properties(),
            target.target_properties(),
            Arc::new(ServerLogger::default()),
            policy,
        );
        Self {
            utilities: Arc::new(utilities),
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for Recorder {}

impl Server for Recorder {
    fn initialize_memory(
        &mut self,
        _memory: ManagedMemoryHandle,
        _size: u64,
        _stream: StreamId,
    ) -> Result<(), ServerError> {
        Ok(())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    fn read(
        &mut self,
        _from: Vec<CopyDescriptor>,
        _stream: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        Box::pin(async { Err(no_memory()) })
    }

    fn write(&mut self, _to: Vec<(CopyDescriptor, Bytes)>, _stream: StreamId) {}

    fn sync(
        &mut self,
        _handles: Vec<BufferBinding>,
        _stream: StreamId,
    ) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn check(
        &mut self,
        _handles: Vec<BufferBinding>,
        _stream: StreamId,
    ) -> Result<(), ServerError> {
        Ok(())
    }

    unsafe fn launch(
        &mut self,
        kernel: Kernel,
        _count: CubeCount,
        _arguments: KernelArguments,
        _stream: StreamId,
        _mode: LaunchMode,
    ) {
        LAUNCHED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(kernel);
    }

    fn flush(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_report(&mut self, _stream: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _stream: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn start_profile(&mut self, _stream: StreamId) -> Result<ProfilingToken, ServerError> {
        Err(no_memory())
    }

    fn end_profile(
        &mut self,
        _stream: StreamId,
        _token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        Err(ProfileError::from(&no_memory()))
    }

    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream: StreamId) {}
}

impl ServerStorage for Recorder {
    type Storage = BytesStorage;

    fn get_resource(
        &mut self,
        _binding: BufferBinding,
        _stream: StreamId,
    ) -> Result<ManagedResource<BytesResource>, ServerError> {
        Err(no_memory())
    }
}
