"""The script of an exported MLflow model, which MLflow copies into the model and runs to load it: no object is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from mii_serve.errors import InvalidRequestError
from mii_serve.replica.pyfunc import COLUMNS, TextToImage, output_folder


class Model(PythonModel):  # type: ignore[misc]
    """Takes a frame with the column `prompt`, gives one with a row for each picture."""

    def load_context(self, context: PythonModelContext) -> None:
        self._model = TextToImage(Path(context.artifacts["model_dir"]), output_folder())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            rows = self._model.predict([*model_input["prompt"]], given)
        except InvalidRequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


set_model(Model())
