# An image for machines with GPUs. Build it, look whether everything is there, train:
#
#   docker build -t tempflow .
#   docker run --rm --gpus all tempflow doctor
#   docker run --rm --gpus all --ipc=host -v "$PWD:/data" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       tempflow train sd35_medium_24gb prompts.train=train.txt prompts.test=test.txt
#   docker run ... --entrypoint torchrun tempflow --standalone --nproc-per-node=8 -m tempflow train sd35_pickscore
#
# torch brings its own CUDA libraries; the compiler and Python's headers are for Triton and torch.compile.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ cmake git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /srv/venv
ENV PATH=/srv/venv/bin:$PATH PIP_NO_CACHE_DIR=1

COPY . /srv/tempflow
RUN cd /srv/tempflow && pip install -c constraints.txt -e '.[rewards]' bitsandbytes

WORKDIR /data
ENTRYPOINT ["tempflow"]
CMD ["--help"]
