//! The checks that notice wrong results of a device, a failure on one of its threads, or too little
//! memory.
//!
//! Guards and wrong kernels are process-wide, so the tests take turns.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Device, FloatDType, Tensor};
use data::contained::contain;
use device::{Backend, Check, CheckOptions, DeviceError, Selected};
use llama_burn::{LlamaConfig, LoadOptions, PackedTokens};
use lora_core::spoil::{OPERATIONS, spoil};
use lora_core::{IntegerWeight, LoraConfig, LoraLinear, Method, Quantization};
use lora_train::guard::{DeviceFault, FaultKind, Guard};
use tests::fixture;
use tests::program::run_with;
use tests::reliability::{Row, record};
use tests::runs::{checkpoints, last_step};
use tests::workspace::Workspace;

/// One test at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// wgpu, if this build and this machine have it; if it is missing and CI requires it, the test
/// fails.
fn wgpu() -> Option<Selected> {
    match device::select(Backend::Wgpu) {
        Ok(selected) => Some(selected),
        Err(error) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
    }
}

fn checks(selected: &Selected, dtype: FloatDType) -> Result<Vec<Check>, DeviceError> {
    let model = LlamaConfig::from_file(&fixture("tied").join("model")).expect("a fixture");
    let lora = LoraConfig {
        r: 4,
        ..LoraConfig::default()
    };
    device::check_device(
        selected,
        &CheckOptions {
            model: &model,
            quantization: Quantization::Bits8,
            dtype,
            lora: &lora,
            longest_row: 24,
        },
    )
}

#[test]
fn every_operation_of_a_layer_is_compared_with_the_cpu() {
    let _turn = turn();
    let Some(selected) = wgpu() else { return };
    let mut types = vec![FloatDType::F32];
    if device::compute_dtype(&selected, Some(FloatDType::F16)).is_ok() {
        types.push(FloatDType::F16);
    }
    for dtype in types {
        let checks = checks(&selected, dtype).unwrap_or_else(|error| panic!("{error}"));
        for check in &checks {
            println!(
                "{dtype:?} {:<28} {:.1e} of {:.0e}",
                check.name, check.difference, check.tolerance
            );
        }
        let has = |name: &str| checks.iter().any(|check| check.name == name);
        for operation in OPERATIONS {
            assert!(has(operation), "{operation} is not compared");
        }
        for pass in [
            "small_product",
            "layer_forward",
            "layer_backward",
            "layer_adapter_gradients",
        ] {
            assert!(has(pass), "{pass} is not compared");
        }
        device::verdict(&selected, &checks).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn an_operation_that_is_wrong_is_named_with_its_device_and_what_to_try() {
    let _turn = turn();
    let Some(selected) = wgpu() else { return };
    for operation in OPERATIONS {
        spoil(Some(operation));
        let checks = checks(&selected, FloatDType::F32);
        spoil(None);
        let checks = checks.unwrap_or_else(|error| panic!("{error}"));
        let error = device::verdict(&selected, &checks).expect_err(operation);
        let text = error.to_string();
        for words in [
            &format!(": {operation} differs"),
            &selected.driver,
            "--no-fusion",
            "--backend cpu",
        ] {
            assert!(text.contains(words), "{words:?} in {text}");
        }
        assert!(
            !text.contains("--no-autotune"),
            "nothing is tuned here: {text}"
        );
        // A wrong operation is off by a tenth, far above the tolerance.
        let check = checks.iter().find(|check| check.name == operation);
        let off = check.map_or(0.0, |check| check.difference);
        assert!(off > 1e-2, "{operation} {off:e}");
    }
}

/// `trainer train --backend wgpu` on a workspace, in `out`.
fn train_on_wgpu(
    workspace: &Workspace,
    settings: &[&str],
    faults: &str,
) -> tests::program::Outcome {
    let mut arguments = workspace.train_arguments(settings);
    let out = workspace.path("out").display().to_string();
    arguments.extend(["--backend=wgpu".into(), "--output-dir".into(), out]);
    // The workspace's own argument selects the CPU.
    arguments.retain(|argument| argument != "--backend" && argument != "cpu");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run_with(&arguments, &[("LORA_TRAINER_FAULT", faults)])
}

#[test]
fn a_run_does_not_start_on_a_device_that_computes_wrong() {
    let _turn = turn();
    if wgpu().is_none() {
        return;
    }
    let workspace = Workspace::new();
    let outcome = train_on_wgpu(&workspace, &[], "wrong_kernel=swiglu_backward");
    outcome.failed_saying(&["computes wrong numbers", "swiglu_backward", "--no-fusion"]);
    assert!(!workspace.path("out").exists(), "nothing was started");
}

#[test]
fn a_device_that_begins_to_compute_wrong_is_noticed_by_check_every() {
    let _turn = turn();
    if wgpu().is_none() {
        return;
    }
    let workspace = Workspace::new();
    let settings = [
        "check_every=2",
        "save_steps=1",
        "val_set_size=0",
        "max_steps=6",
    ];
    let outcome = train_on_wgpu(&workspace, &settings, "wrong_kernel=rope_backward:3");
    assert_eq!(outcome.code, Some(75), "{}", outcome.text);
    outcome.failed_saying(&[
        "step 4: ",
        "rope_backward differs",
        "after step 2",
        "Step 3 is saved",
        "--resume",
    ]);
    let out = workspace.path("out");
    assert_eq!(last_step(&out), 3);
    assert!(!checkpoints(&out).iter().any(|name| name.contains("000004")));
    record(&Row {
        place: 75,
        fault: "A GPU computes an operation wrong: from the start, or from some step on (`check_every`)",
        happened: "the comparison of a decoder layer with the CPU names the operation, the driver and the switches \
                   to try; the run does not start, or stops and keeps the earlier checkpoint",
        lost: "the steps since the last successful comparison may be wrong, and the message names them",
        recovery: None,
    });
}

#[test]
fn comparisons_in_the_middle_of_a_run_leave_it_as_it_is() {
    let _turn = turn();
    if wgpu().is_none() {
        return;
    }
    let workspace = Workspace::new();
    let settings = ["val_set_size=0", "max_steps=3"];
    train_on_wgpu(&workspace, &settings, "").succeeded();
    let numbers = tests::runs::numbers(&workspace.path("out"));
    let workspace = Workspace::new();
    let settings = [&settings[..], &["check_every=1"]].concat();
    train_on_wgpu(&workspace, &settings, "").succeeded();
    assert_eq!(tests::runs::numbers(&workspace.path("out")), numbers);
}

// Threads.

#[test]
fn a_panic_on_another_thread_fails_the_work_that_went_on() {
    let _turn = turn();
    let guard = Guard::install();
    let elsewhere = |text: &'static str| {
        let thread = std::thread::spawn(move || panic!("{text}"));
        drop(thread.join());
    };
    let failed = |outcome: Result<i32, DeviceFault>| outcome.expect_err("it failed");
    let fault = failed(guard.run(|| {
        elsewhere("wgpu error: Out of Memory");
        7
    }));
    assert_eq!(fault.kind, FaultKind::OutOfMemory);
    assert_eq!(fault.message, "wgpu error: Out of Memory");
    // A fault is reported once.
    assert_eq!(guard.run(|| 7), Ok(7));
    // Between two calls: the device is asynchronous.
    elsewhere("a kernel failed");
    assert_eq!(failed(guard.run(|| 7)).message, "a kernel failed");
    // The first panic has the cause; the caller's panic is only a consequence.
    let fault = failed(guard.run(|| {
        elsewhere("the device was lost");
        panic!("the channel is closed")
    }));
    assert_eq!(fault.kind, FaultKind::Lost);
    // Panics that follow from a handled failure are forgotten.
    elsewhere("an echo");
    guard.settle(|| elsewhere("another"));
    assert_eq!(guard.run(|| 7), Ok(7));
}

#[test]
fn a_panic_that_is_caught_on_purpose_fails_nothing() {
    let _turn = turn();
    // The hook of `contain` before the guard's, and after it.
    let before = contain(|| panic!("a bad file"));
    assert_eq!(before, Err::<(), _>("a bad file".into()));
    let guard = Guard::install();
    let inside = guard.run(|| {
        let thread = std::thread::spawn(|| contain(|| panic!("a bad tokenizer")));
        let elsewhere: Result<(), String> = thread.join().expect("it was caught");
        (contain(|| panic!("a bad file")), elsewhere)
    });
    let bad = |text: &str| Err::<(), _>(text.to_string());
    assert_eq!(inside, Ok((bad("a bad file"), bad("a bad tokenizer"))));
}

/// Named as CubeCL's own function, whose panics CubeCL turns into an error of the kernel's outputs,
/// or of a candidate in tuning.
trait CubeKernel {
    fn define(&self);
}

struct Impossible;

impl CubeKernel for Impossible {
    fn define(&self) {
        panic!("no such tile");
    }
}

#[test]
fn a_panic_in_a_kernel_s_definition_is_left_to_cubecl() {
    let _turn = turn();
    let guard = Guard::install();
    let kernel: Box<dyn CubeKernel> = std::hint::black_box(Box::new(Impossible));
    let outcome = guard.run(|| {
        let define = std::panic::AssertUnwindSafe(|| kernel.define());
        std::panic::catch_unwind(define).is_err()
    });
    assert_eq!(outcome, Ok(true));
}

/// CubeCL logs the panic of a task that is not waited for, and the work continues.
#[test]
fn a_task_that_panics_on_the_device_s_own_thread_fails_the_work() {
    let _turn = turn();
    let Some(selected) = wgpu() else { return };
    let Some(limit) = device::largest_buffer(&selected) else {
        panic!("a GPU has a limit")
    };
    let guard = Guard::install();
    let device = &selected.device;
    let outcome = guard.run(|| {
        let x = Tensor::<1>::ones([1024], device);
        x.sum().into_scalar::<f32>()
    });
    assert_eq!(outcome, Ok(1024.0));
    // Larger than any buffer: this is not a lack of memory, and smaller micro-batches need not
    // help.
    let elements = limit as usize / 4 + 1024;
    let fault = guard
        .run(|| {
            let x = Tensor::<1>::ones([elements], device);
            x.sum().into_scalar::<f32>()
        })
        .expect_err("no buffer is that large");
    println!("beyond {limit} bytes: {fault}");
    assert_eq!(fault.kind, FaultKind::TooLargeTensor, "{fault}");
    // The device still works.
    guard.settle(|| drop(device.sync()));
    let outcome = guard.run(|| {
        let x = Tensor::<1>::ones([1024], device);
        x.sum().into_scalar::<f32>()
    });
    assert_eq!(outcome, Ok(1024.0));
}

// Memory.

/// Set in the process whose memory is limited.
const CHILD: &str = "LORA_TEST_LITTLE_MEMORY";

/// Run by the test below with limited memory: allocates until there is none left.
#[test]
fn takes_memory_until_there_is_none_if_it_is_asked_to() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let selected = device::select(Backend::Wgpu).unwrap_or_else(|error| panic!("{error}"));
    let device: &Device = &selected.device;
    let guard = Guard::install();
    let warm = guard.run(|| Tensor::<1>::ones([1024], device).sum().into_scalar::<f32>());
    assert_eq!(warm, Ok(1024.0));
    let mut held = Vec::new();
    let fault = loop {
        let taken = guard.run(|| {
            let x = Tensor::<1>::ones([16 << 20], device);
            let sum = x.clone().sum().into_scalar::<f32>();
            (x, sum)
        });
        match taken {
            Ok((x, _)) => held.push(x),
            Err(fault) => break fault,
        }
        assert!(held.len() < 400, "the limit does not work");
    };
    println!("after {} of 64 MiB: {:?} {fault}", held.len(), fault.kind);
    held.clear();
    guard.settle(|| drop(device.sync()));
    let again = guard.run(|| Tensor::<1>::ones([1024], device).sum().into_scalar::<f32>());
    println!("then: {again:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn an_allocation_that_fails_on_wgsl_is_the_device_s_memory_being_too_small() {
    let _turn = turn();
    if wgpu().is_none() || std::env::var_os(CHILD).is_some() {
        return;
    }
    let test = "takes_memory_until_there_is_none_if_it_is_asked_to";
    let program = std::env::current_exe().expect("a test has a path");
    let command = format!(
        "ulimit -v 4000000; exec {} --exact {test} --nocapture",
        program.display()
    );
    let output = Command::new("sh")
        .args(["-c", &command])
        .env(CHILD, "1")
        .output()
        .expect("there is a shell");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    assert!(text.contains("OutOfMemory"), "{text}");
    assert!(text.contains("then: Ok(1024.0)"), "{text}");
}

/// For all types of weights and adapters, a layer that is copied to the host is the same there.
#[test]
fn a_layer_of_a_model_is_compared_as_it_is() {
    let _turn = turn();
    let Some(selected) = wgpu() else { return };
    let folder = fixture("tied").join("model");
    let config = LlamaConfig::from_file(&folder).expect("a fixture");
    let device = selected.device.clone().autodiff();
    let row: Vec<u32> = (0..40).map(|i| i % 60).collect();
    let rows = PackedTokens::from_sequences([&row[..9], &row[..3], &row]);
    let forms = [
        (Quantization::Bits8, Method::Lora, false),
        (Quantization::Bits4, Method::Dora, false),
        (Quantization::None, Method::Lora, false),
        (Quantization::Bits8, Method::Vera, false),
        (Quantization::Bits8, Method::Lora, true),
    ];
    for (quantization, method, from_gguf) in forms {
        let options = LoadOptions {
            quantization,
            ..LoadOptions::default()
        };
        let model = llama_burn::load(&folder, &config, options, &device, |_| {});
        let mut model = model.unwrap_or_else(|error| panic!("{error}"));
        if from_gguf {
            // Blocks along the input dimension, as llama.cpp makes them.
            let gate = &mut model.layers[1].mlp.gate_proj;
            let [d_in, d_out] = gate.dims();
            let integers = (0..d_in * d_out).map(|i| (i * 37 % 256) as u8 as i8);
            let scales = (0..d_in * d_out / 4).map(|i| 1e-4 * (1 + i % 23) as f32);
            let weight = IntegerWeight::new(integers.collect(), scales.collect(), 4, [d_in, d_out]);
            let weight = Param::from_tensor(weight.on(&selected.device)).set_require_grad(false);
            *gate = LoraLinear::frozen(Linear { weight, bias: None });
        }
        let lora = LoraConfig {
            method,
            ..LoraConfig::default()
        };
        let model = model.with_lora(&lora, 3);
        let model = model.unwrap_or_else(|error| panic!("{error}"));
        for index in 0..model.layers.len() {
            let checks = device::check_layer(&selected, &model, index, &rows);
            let checks = checks.unwrap_or_else(|error| panic!("{error}"));
            device::verdict(&selected, &checks).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn a_stated_memory_decides_what_fits_a_gpu_before_anything_is_loaded() {
    let _turn = turn();
    if wgpu().is_none() {
        return;
    }
    let workspace = Workspace::new();
    let large = ["max_steps=1", "lora_r=8192", "device_memory=4MiB"];
    train_on_wgpu(&workspace, &large, "")
        .failed_saying(&["this run needs about", "of device_memory may be used"]);
    assert!(!workspace.path("out").exists(), "nothing was started");
    let text = train_on_wgpu(&workspace, &["max_steps=1", "device_memory=8GiB"], "").succeeded();
    assert!(text.contains("of 8.00 GiB at the peak"), "{text}");
    assert!(!text.contains("does not report its memory"), "{text}");
    let workspace = Workspace::new();
    let text = train_on_wgpu(&workspace, &["max_steps=1"], "").succeeded();
    assert_eq!(
        text.matches("does not report its memory").count(),
        1,
        "{text}"
    );
}

#[test]
fn operations_are_not_fused_where_it_is_not_wanted_and_the_screen_says_so() {
    let _turn = turn();
    if wgpu().is_none() {
        return;
    }
    // The kernels that the driver compiles, from CubeCL's own log.
    let fused = |switch: &[&str]| {
        let workspace = Workspace::new();
        let log = workspace.path("kernels");
        let config = workspace.path("config.toml").display().to_string();
        let out = workspace.path("out").display().to_string();
        let arguments = [
            &[
                "train",
                "--backend",
                "wgpu",
                "--config",
                &config,
                "--output-dir",
                &out,
            ][..],
            &["--set", "max_steps=1", "--set", "val_set_size=0"],
            switch,
        ];
        let log_to = log.display().to_string();
        let environment = [
            ("CUBECL_DEBUG_LOG", log_to.as_str()),
            ("CUBECL_DEBUG_OPTION", "debug"),
        ];
        let text = run_with(&arguments.concat(), &environment).succeeded();
        let kernels = std::fs::read_to_string(log).unwrap_or_default();
        assert!(
            kernels.contains("Matmul") || kernels.contains("matmul"),
            "no kernel is logged"
        );
        (kernels.matches("burn_cubecl_fusion").count(), text)
    };
    let (some, _) = fused(&[]);
    let (none, text) = fused(&["--no-fusion"]);
    assert!(some > 0 && none == 0, "{some} and {none}");
    assert!(text.contains("running with --no-fusion"), "{text}");
}
