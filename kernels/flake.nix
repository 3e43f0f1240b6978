# No flake.lock stands beside this file: only nix can write one (`nix flake update` in the folder that hub_folder.py
# made). Commit it there before the first upload: it pins the builder, so that the build can be repeated.
{
  description = "tempflow-kernels for the kernel hub";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
